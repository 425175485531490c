"""`moe-tool demo`: the whole pipeline on the embedded model."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from moe_tool.artifact_folder import buddies_path, profile_path
from moe_tool.budget.request import parse_memory
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.buddies import buddies_fields, make_buddies
from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import JsonOption

if TYPE_CHECKING:
    from moe_tool.evaluation.evaluate import EvaluationReport
    from moe_tool.runtime.generation import RunResult

T = TypeVar("T")

PROMPT = "The list"
_PROFILE_TOKENS = 16384
_EVALUATION_TOKENS = 1024
_EVALUATION_SEQ_LEN = 128
_SEQ_LEN = 256
_GENERATED_TOKENS = 48
_LOSSY_MEMORY = "50%"


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Keep profile and bundle here.", show_default="thrown away"
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Do all of a session on the embedded model and built-in text."""
    with open_output(as_json=json) as output:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            _Demo(out, output).run()
            output.say(f"kept in {out}/; next: moe-tool run {out}/bundle/ --prompt {PROMPT!r}")
            return
        with TemporaryDirectory(prefix="moe-tool-demo-") as folder:
            _Demo(Path(folder), output).run()
        output.say("next, the same by hand: moe-tool profile demo --data builtin")


class _Demo:
    """The pipeline with its results, stage by stage."""

    def __init__(self, folder: Path, output: Output) -> None:
        self._folder = folder
        self._output = output
        self._rows: list[tuple[str, str, float]] = []
        self._fields: dict[str, object] = {}

    def run(self) -> None:
        """Do everything, then show the table."""
        import torch

        from moe_tool.reports.terminal import evaluation_table, stages_table

        torch.set_num_threads(1)  # the model is so small that a second thread only waits
        profile = self._stage("profile", self._profile)
        buddies = self._stage("buddies", lambda: self._buddies(profile))
        bundle = self._stage("pack", lambda: self._pack(profile, buddies))
        roomy = self._stage("run, all experts in memory", lambda: self._run(bundle, "100%"))
        tight = self._stage("run, as little memory as works", lambda: self._run(bundle, "min"))
        report = self._stage("evaluate", lambda: self._evaluate(bundle))
        self._output.show(
            stages_table(self._rows),
            f"{PROMPT}{roomy.text}\n",
            f"policies on held-out text, {_LOSSY_MEMORY} of the experts in memory",
            evaluation_table([(row.policy, row.figures) for row in report.rows]),
        )
        same = roomy.token_ids == tight.token_ids
        self._output.say(
            f"exact is exact: with {tight.slots} and with {roomy.slots} experts in memory the "
            + ("tokens are the same" if same else "tokens DIFFER, which is a bug")
        )
        self._output.result({"exact": same, "stages": self._fields})
        if not same:
            raise AssertionError("the text depends on the memory")

    def _stage(self, name: str, work: Callable[[], T]) -> T:
        self._output.say(f"{name} ...")
        start = time.perf_counter()
        result = work()
        stage, outcome, _ = self._rows[-1]
        self._rows[-1] = (name, outcome, time.perf_counter() - start)
        return result

    def _done(self, stage: str, outcome: str, fields: object) -> None:
        self._rows.append((stage, outcome, 0.0))
        self._fields[stage] = fields

    def _profile(self) -> Path:
        from moe_tool.models.locate import locate_model
        from moe_tool.profiling.recorder import record_profile
        from moe_tool.text.sources import parse_sources

        report = record_profile(
            locate_model("demo", offline=True),
            parse_sources(["builtin"]),
            out=profile_path(self._folder, "demo"),
            tokens=_PROFILE_TOKENS,
            seq_len=_SEQ_LEN,
            progress=self._output.progress,
        )
        self._done(
            "profile",
            f"{report.tokens} tokens of {' and '.join(report.domains)} through {report.layers} "
            f"layers of {report.experts} experts, {report.top_k} per token; "
            f"{report.tokens_per_second:.0f} tokens/s",
            asdict(report),
        )
        return report.profile

    def _buddies(self, profile: Path) -> Path:
        out = buddies_path(self._folder, profile)
        made = make_buddies(profile, k=2, by="output", out=out)
        self._done(
            "buddies",
            f"two stand-ins per expert; the best leaves {made.summary.price_in_sample:.2f} of the "
            f"output as error, {made.summary.price_held_out:.2f} on held-out text",
            buddies_fields(made),
        )
        return made.path

    def _pack(self, profile: Path, buddies: Path) -> Path:
        from moe_tool.models.architecture import open_model
        from moe_tool.models.locate import locate_model
        from moe_tool.packing.pack_bundle import pack_bundle
        from moe_tool.packing.pack_options import PackOptions

        located = locate_model("demo", offline=True)
        opened = open_model(located)
        with opened.checkpoint:
            report = pack_bundle(
                opened,
                located.folder,
                PackOptions(out=self._folder / "bundle"),
                profile=profile,
                buddies=buddies,
                progress=self._output.progress,
            )
        self._done(
            "pack",
            f"{format_bytes(report.bytes)}, experts {format_bytes(report.expert_bytes)} at "
            f"{report.bits_per_weight:.1f} bits per weight",
            asdict(report),
        )
        return report.bundle

    def _run(self, bundle: Path, memory: str) -> "RunResult":
        from moe_tool.runtime.generation import GenerateOptions, run_prompt
        from moe_tool.runtime.run_options import run_options

        result = run_prompt(
            bundle,
            PROMPT,
            options=run_options(memory=memory),
            generation=GenerateOptions(max_tokens=_GENERATED_TOKENS),
            progress=self._output.progress,
        )
        self._done(
            f"run {memory}",
            f"{result.generated_tokens} tokens, {result.tokens_per_second:.0f} tokens/s, "
            f"{result.slots} experts in memory, hit rate {result.hit_rate:.0%}",
            asdict(result),
        )
        return result

    def _evaluate(self, bundle: Path) -> "EvaluationReport":
        from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
        from moe_tool.text.sources import parse_sources

        report = evaluate(
            bundle,
            parse_sources(["builtin:eval"]),
            EvaluateOptions(
                tokens=_EVALUATION_TOKENS,
                seq_len=_EVALUATION_SEQ_LEN,
                memory=parse_memory(_LOSSY_MEMORY),
                policy="buddy",
                controls=True,
            ),
            progress=self._output.progress,
        )
        figures = report.figures
        self._done(
            "evaluate",
            f"perplexity {figures.perplexity_exact:.1f}; buddies for misses cost "
            f"{figures.kl_mean:.3f} nats per token",
            report.to_json(),
        )
        return report
