"""Work of `eval-harness`: load tasks of lm_eval and run them on a bundle."""

import importlib.util
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_tool.artifacts.evaluation_report import HarnessReport, MetricRow
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
from moe_tool.runtime.generation import run_setup
from moe_tool.runtime.run_options import RunOptions
from moe_tool.text.hub_datasets import libraries_offline

if TYPE_CHECKING:
    from moe_tool.evaluation.lm_eval_model import BundleLM

_N_BOOTSTRAP = 1000
"""Resamples for the few metrics whose error has no formula; lm_eval's default of 100000 would fork
a pool of processes, outside of the memory budget"""


def require_lm_eval() -> None:
    """Raise a UsageError if lm_eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "eval-harness needs lm-evaluation-harness (lm_eval), which is not installed",
            hint="pip install 'moe-tool[eval-harness]'",
        )


def run_harness(
    folder: Path, run: RunOptions, options: HarnessOptions, *, progress: Progress = SILENT
) -> HarnessReport:
    """Run tasks of lm_eval on a bundle, one request at a time.

    Seeds python's, numpy's and torch's generators, as lm_eval does. Code of a task runs only from
    lm_eval itself or from beside a named YAML file; none is downloaded.

    Raises:
        UsageError: lm_eval is not installed, or a task is unknown or not supported.
        NotFoundError, DataSourceError: the data of a task is missing or unreadable.
        BudgetError: the memory budget is too small.
        CorruptArtifactError: the bundle is damaged.
    """
    require_lm_eval()
    from lm_eval import __version__ as lm_eval_version

    from moe_tool.evaluation.lm_eval_model import BundleLM

    start = time.perf_counter()
    with BundleLM(folder, run, decode_context=options.decode_context, progress=progress) as model:
        rows = metric_rows(_results(model, options, run.seed, progress))
        return HarnessReport(
            bundle=str(folder),
            rows=rows,
            setup=run_setup(model.session),
            lossy=model.session.runner.policy.is_lossy,
            decode_context=options.decode_context,
            limit=options.limit,
            lm_eval_version=lm_eval_version,
            cut_contexts=model.n_cut_contexts,
            prompt=model.stats.prompt,
            decode=model.stats.decode,
            seconds=time.perf_counter() - start,
            peak_rss_bytes=peak_rss_bytes(),
        )


def _results(model: "BundleLM", options: HarnessOptions, seed: int, progress: Progress) -> Any:
    """Load the tasks and run lm_eval's evaluator; see `run_harness`."""
    import jinja2
    import torch
    from lm_eval.evaluator import evaluate

    with ExitStack() as stack:
        refused = stack.enter_context(no_downloaded_metrics())
        stack.enter_context(_no_forks())
        online = not options.offline and hub_is_reachable()
        if not online:
            stack.enter_context(libraries_offline())
        loaded = load_tasks(options, refused, is_online=online)
        set_up_tasks(loaded["tasks"], options.num_fewshot, progress)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            return evaluate(
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


def metric_rows(results: Any) -> tuple[MetricRow, ...]:
    """Return the figures in a result of `lm_eval.evaluator.evaluate`, in its order."""
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


@contextmanager
def _no_forks() -> Iterator[None]:
    """Keep lm_eval from forking this process, which has reader threads."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
