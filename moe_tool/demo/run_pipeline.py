"""Work of `demo`: every stage of the pipeline on the embedded model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from moe_tool.artifact_folder import buddies_path, profile_path
from moe_tool.artifacts.buddy_summary import BuddyReport
from moe_tool.artifacts.evaluation_report import EvaluationReport
from moe_tool.artifacts.run_result import RunResult
from moe_tool.buddies.make_buddies import make_buddies
from moe_tool.budget.request import parse_memory
from moe_tool.budget.sizes import format_bytes
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.models.locate import locate_model
from moe_tool.packing.pack_bundle import pack_bundle
from moe_tool.packing.pack_options import PackOptions
from moe_tool.packing.write_bundle import PackReport
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.profiling.recorder import ProfileReport, record_profile
from moe_tool.progress import Progress
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import run_prompt
from moe_tool.runtime.run_options import run_options
from moe_tool.text.sources import parse_sources

PROMPT = "The list"
LOSSY_MEMORY = "50%"
_PROFILE_TOKENS = 16384
_EVALUATION_TOKENS = 1024
_EVALUATION_SEQ_LEN = 128
_SEQ_LEN = 256
_GENERATED_TOKENS = 48
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The pipeline's results."""

    stages: tuple[tuple[str, str, float], ...]
    """Title, outcome and seconds of each stage"""
    profile: ProfileReport
    buddies: BuddyReport
    pack: PackReport
    roomy: RunResult
    """Run with all experts in memory"""
    tight: RunResult
    """Run with `--memory min`"""
    evaluation: EvaluationReport

    @property
    def exact(self) -> bool:
        """Whether both runs gave the same tokens."""
        return self.roomy.token_ids == self.tight.token_ids


def run_pipeline(folder: Path, *, progress: Progress) -> DemoReport:
    """Profile, find buddies, pack, run twice and evaluate, with the files in `folder`."""
    torch.set_num_threads(1)  # the model is so small that a second thread only waits
    stages: list[tuple[str, str, float]] = []

    def stage(title: str, work: Callable[[], tuple[T, str]]) -> T:
        progress.note(f"{title} ...")
        start = time.perf_counter()
        result, outcome = work()
        stages.append((title, outcome, time.perf_counter() - start))
        return result

    profile = stage("profile", lambda: _profile(folder, progress))
    buddies = stage("buddies", lambda: _buddies(folder, profile))
    pack = stage("pack", lambda: _pack(folder, profile, buddies, progress))
    roomy = stage("run, all experts in memory", lambda: _run(pack.bundle, "100%", progress))
    tight = stage("run, as little memory as works", lambda: _run(pack.bundle, "min", progress))
    evaluation = stage("evaluate", lambda: _evaluate(pack.bundle, progress))
    return DemoReport(
        stages=tuple(stages),
        profile=profile,
        buddies=buddies,
        pack=pack,
        roomy=roomy,
        tight=tight,
        evaluation=evaluation,
    )


def _profile(folder: Path, progress: Progress) -> tuple[ProfileReport, str]:
    report = record_profile(
        locate_model("demo", offline=True),
        parse_sources(["builtin"]),
        out=profile_path(folder, "demo"),
        tokens=_PROFILE_TOKENS,
        seq_len=_SEQ_LEN,
        progress=progress,
    )
    return report, (
        f"{report.tokens} tokens of {' and '.join(report.domains)} through {report.layers} "
        f"layers of {report.experts} experts, {report.top_k} per token; "
        f"{report.tokens_per_second:.0f} tokens/s"
    )


def _buddies(folder: Path, profile: ProfileReport) -> tuple[BuddyReport, str]:
    out = buddies_path(folder, profile.profile)
    report = make_buddies(profile.profile, k=2, by="output", out=out)
    return report, (
        f"two stand-ins per expert; relative error of the best {report.summary.price_in_sample:.2f}"
        f" in-sample, {report.summary.price_held_out:.2f} on held-out text"
    )


def _pack(
    folder: Path, profile: ProfileReport, buddies: BuddyReport, progress: Progress
) -> tuple[PackReport, str]:
    report = pack_bundle(
        locate_model("demo", offline=True),
        PackOptions(out=folder / "bundle"),
        profile=profile.profile,
        buddies=buddies.buddies,
        progress=progress,
    )
    return report, (
        f"{format_bytes(report.bytes)}, experts {format_bytes(report.expert_bytes)} at "
        f"{report.bits_per_weight:.1f} bits per weight"
    )


def _run(bundle: Path, memory: str, progress: Progress) -> tuple[RunResult, str]:
    result = run_prompt(
        bundle,
        PROMPT,
        options=run_options(memory=memory),
        generation=GenerateOptions(max_tokens=_GENERATED_TOKENS),
        progress=progress,
    )
    return result, (
        f"{result.generated_tokens} tokens, {result.tokens_per_second:.0f} tokens/s, "
        f"{result.setup.slots} experts in memory, hit rate {result.decode.hit_rate:.0%}"
    )


def _evaluate(bundle: Path, progress: Progress) -> tuple[EvaluationReport, str]:
    options = EvaluateOptions(
        tokens=_EVALUATION_TOKENS,
        seq_len=_EVALUATION_SEQ_LEN,
        memory=parse_memory(LOSSY_MEMORY),
        policy=parse_miss_policy("buddy"),
        controls=True,
    )
    report = evaluate(bundle, parse_sources(["builtin:eval"]), options, progress=progress)
    return report, (
        f"perplexity {report.figures.perplexity_exact.value:.1f}; buddies for misses cost "
        f"{report.figures.kl_mean.value:.3f} nats per token"
    )
