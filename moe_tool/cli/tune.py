"""`moe-tool tune`: group of the commands that train parts of a bundle."""

import typer

from moe_tool.cli import tune_pruning, tune_weights

tune = typer.Typer(
    help="Train parts of a bundle: codes of experts, mask routers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
tune.command("weights")(tune_weights.tune_weights)
tune.command("pruning")(tune_pruning.tune_pruning)
