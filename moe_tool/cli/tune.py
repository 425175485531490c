"""`moe-tool tune`: what of a bundle can be trained, a verb of its own for each."""

import typer

from moe_tool.cli import tune_pruning

tune = typer.Typer(
    help="Train what a bundle holds, beside its exact model.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
tune.command("pruning")(tune_pruning.tune_pruning)
