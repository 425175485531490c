"""`moe-tool demo`: the whole pipeline on the embedded model."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from moe_tool.cli.console import Output
from moe_tool.cli.verb import verb


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoArguments:
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep profile and bundle here.", show_default="deleted"),
    ] = None


@verb
def demo(given: DemoArguments, output: Output) -> None:
    """Run every stage on the embedded model and built-in text."""
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        prompt = _run(given.out, output)
        output.say(
            f"kept in {given.out}/; next: moe-tool run {given.out}/bundle/ --prompt {prompt!r}"
        )
        return
    with TemporaryDirectory(prefix="moe-tool-demo-") as folder:
        _run(Path(folder), output)
    output.say("next, the same by hand: moe-tool profile demo --data builtin")


def _run(folder: Path, output: Output) -> str:
    """Run every stage, show the results, and return the prompt."""
    from moe_tool.demo.run_pipeline import LOSSY_MEMORY, PROMPT, run_pipeline
    from moe_tool.reports.evaluation_tables import evaluation_table
    from moe_tool.reports.terminal import stages_table

    report = run_pipeline(folder, progress=output.progress)
    roomy, tight = report.roomy, report.tight
    output.show(
        stages_table(report.stages),
        f"{PROMPT}{roomy.text}\n",
        f"policies on held-out text, {LOSSY_MEMORY} of the experts in memory",
        evaluation_table(report.evaluation.by_policy()),
    )
    output.say(
        f"exact is exact: with {tight.setup.slots} and with {roomy.setup.slots} experts in memory "
        "the " + ("tokens are the same" if report.exact else "tokens DIFFER, which is a bug")
    )
    stages = {
        "profile": report.profile,
        "buddies": report.buddies,
        "pack": report.pack,
        "run 100%": roomy,
        "run min": tight,
        "evaluate": report.evaluation,
    }
    output.result({"exact": report.exact, "stages": stages})
    if not report.exact:
        raise AssertionError("the text depends on the memory")
    return PROMPT
