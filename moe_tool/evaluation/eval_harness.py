"""The story of `eval-harness`: tasks of lm_eval are loaded, and answered by a bundle."""

import importlib.util
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import DataSourceError, UsageError
from moe_tool.evaluation.harness_tasks import (
    HarnessOptions,
    load_tasks,
    no_downloaded_metrics,
    set_up_tasks,
)
from moe_tool.formats.hub_probe import hub_is_reachable
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.run_options import RunOptions
from moe_tool.text.hub_datasets import libraries_offline

if TYPE_CHECKING:
    from moe_tool.evaluation.lm_eval_model import BundleLM

_N_BOOTSTRAP = 1000
"""Of the few metrics whose error has no formula; lm_eval's own 100000 are made by a pool of forked
processes, outside of the memory budget"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One figure of one task or group."""

    task: str
    version: str
    filter: str
    shots: int | None
    samples: int | None
    """Documents; None of a group"""
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessReport:
    """What the tasks gave, and what it took. Rates are of decoding alone, as in a run."""

    bundle: str
    rows: tuple[MetricRow, ...]
    policy: str
    residency: str
    lossy: bool
    decode_context: bool
    limit: int | None
    lm_eval_version: str
    cut_contexts: int
    """Requests whose context was too long and lost its beginning"""
    prompt_tokens: int
    """Answered exactly, whatever the policy"""
    decode_tokens: int
    """Answered by the policy"""
    hits: int
    misses: int
    hit_rate: float
    bytes_read_per_token: float
    stall_seconds: float
    substitutions: int
    lowered: int
    """Slots answered by a replica of the expert"""
    drops: int
    prompt_hits: int
    prompt_misses: int
    prompt_bytes_read: int
    memory_budget_bytes: int
    slots: int
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `--json`."""
        return asdict(self)


def require_lm_eval() -> None:
    """Refuse to go on without lm_eval.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "eval-harness needs lm-evaluation-harness (lm_eval), which is not installed",
            hint="pip install 'moe-tool[eval-harness]'",
        )


def run_harness(
    folder: Path, run: RunOptions, options: HarnessOptions, *, progress: Progress = SILENT
) -> HarnessReport:
    """Run tasks of lm_eval on a bundle, one request at a time.

    Seeds python's, numpy's and torch's generators, as lm_eval does. Code of a task is run only
    where it lies on this machine: in lm_eval itself, or beside a YAML file that was named.

    Args:
        folder: of the bundle.
        run: how the bundle runs.
        options: which tasks.
        progress: told about requests, and that a policy is lossy.

    Raises:
        UsageError: lm_eval is not installed, a task is not known, or cannot be asked of a bundle.
        NotFoundError, DataSourceError: the data of a task.
        BudgetError: the memory budget does not suffice.
        CorruptArtifactError: the bundle is damaged.
    """
    require_lm_eval()
    import jinja2
    import torch
    from lm_eval import __version__ as lm_eval_version
    from lm_eval.evaluator import evaluate

    from moe_tool.evaluation.lm_eval_model import BundleLM

    start = time.perf_counter()
    with (
        BundleLM(folder, run, decode_context=options.decode_context, progress=progress) as model,
        ExitStack() as stack,
    ):
        refused = stack.enter_context(no_downloaded_metrics())
        stack.enter_context(_no_forks())
        online = not options.offline and hub_is_reachable()
        if not online:
            stack.enter_context(libraries_offline())
        loaded = load_tasks(options, refused, is_online=online)
        set_up_tasks(loaded["tasks"], options.num_fewshot, progress)
        random.seed(run.seed)
        np.random.seed(run.seed % 2**32)
        torch.manual_seed(run.seed)
        try:
            results = evaluate(
                model,
                loaded,
                limit=options.limit,
                bootstrap_iters=_N_BOOTSTRAP,
                log_samples=False,
            )
        except jinja2.TemplateError as error:
            raise DataSourceError(
                f"a template of the task does not fit its data: {error}",
                hint="compare doc_to_text, doc_to_choice and doc_to_target with the fields of the "
                "data set",
            ) from error
        return _report(
            model,
            folder,
            options,
            metric_rows(results),
            lm_eval_version=lm_eval_version,
            seconds=time.perf_counter() - start,
        )


def metric_rows(results: Any) -> tuple[MetricRow, ...]:
    """Return the figures of lm_eval's results, in its order.

    Args:
        results: what `lm_eval.evaluator.evaluate` returned.
    """
    rows = []
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            stderr = figures.get(f"{metric}_stderr,{filter_name}")
            better = results["higher_is_better"].get(task, {}).get(metric)
            rows.append(
                MetricRow(
                    task=task,
                    version=str(results["versions"].get(task, "")),
                    filter=filter_name,
                    shots=results["n-shot"].get(task),
                    samples=results["n-samples"].get(task, {}).get("effective"),
                    metric=metric,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    higher_is_better=better,
                )
            )
    return tuple(rows)


def _report(
    model: "BundleLM",
    folder: Path,
    options: HarnessOptions,
    rows: tuple[MetricRow, ...],
    *,
    lm_eval_version: str,
    seconds: float,
) -> HarnessReport:
    session, prompt, decode = model.session, model.stats.prompt, model.stats.decode
    return HarnessReport(
        bundle=str(folder),
        rows=rows,
        policy=session.runner.policy.name,
        residency=session.runner.residency,
        lossy=session.runner.policy.policy.lossy,
        decode_context=options.decode_context,
        limit=options.limit,
        lm_eval_version=lm_eval_version,
        cut_contexts=model.n_cut_contexts,
        prompt_tokens=prompt.tokens,
        decode_tokens=decode.tokens,
        hits=decode.hits,
        misses=decode.misses,
        hit_rate=decode.hit_rate,
        bytes_read_per_token=decode.bytes_read / decode.tokens if decode.tokens else 0.0,
        stall_seconds=decode.stall_seconds,
        substitutions=decode.substitutions,
        lowered=decode.replica_answers,
        drops=decode.drops,
        prompt_hits=prompt.hits,
        prompt_misses=prompt.misses,
        prompt_bytes_read=prompt.bytes_read,
        memory_budget_bytes=session.plan.memory.budget_bytes,
        slots=session.plan.memory.n_slots,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


@contextmanager
def _no_forks() -> Iterator[None]:
    """Keep lm_eval from forking this process, its reader threads included."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
