"""The story of `eval-harness`: tasks of lm_eval are found, loaded, and answered by a bundle."""

import difflib
import importlib.util
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import DataSourceError, MoeToolError, NotFoundError, UsageError
from moe_tool.formats.hub_probe import hub_endpoint, hub_is_forbidden, hub_is_reachable
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.run_options import RunOptions
from moe_tool.text.hub_datasets import libraries_offline

if TYPE_CHECKING:
    from moe_tool.evaluation.lm_eval_model import BundleLM

_FEWSHOT_SEED = 1234
"""lm_eval's own, so that a task has the examples that it has elsewhere"""
_N_BOOTSTRAP = 1000
"""Of the few metrics whose error has no formula; lm_eval's own 100000 are made by a pool of forked
processes, outside of the memory budget"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """Which tasks are run, and how much of them."""

    tasks: tuple[str, ...]
    """Names that lm_eval or a folder of `include` knows, or paths of YAML files and folders"""
    include: tuple[Path, ...] = ()
    """Folders with more tasks"""
    limit: int | None = None
    """Documents per task"""
    num_fewshot: int | None = None
    """None: as the task has it"""
    decode_context: bool = False
    """Whether the policy answers in the context of a log-likelihood too"""
    offline: bool = False


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
        refused = stack.enter_context(_no_downloaded_metrics())
        stack.enter_context(_no_forks())
        online = not options.offline and hub_is_reachable()
        if not online:
            stack.enter_context(libraries_offline())
        loaded = _load_tasks(options, refused, is_online=online)
        _set_up(loaded["tasks"], options.num_fewshot, progress)
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
        drops=decode.drops,
        prompt_hits=prompt.hits,
        prompt_misses=prompt.misses,
        prompt_bytes_read=prompt.bytes_read,
        memory_budget_bytes=session.plan.budget_bytes,
        slots=session.plan.n_slots,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _load_tasks(
    options: HarnessOptions, refused: list[str], *, is_online: bool
) -> dict[str, dict[str, Any]]:
    """Tasks, groups and group_map, as lm_eval's own `load` returns them."""
    manager, names = _find_tasks(options)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except MoeToolError:
            raise
        except Exception as error:  # a task is a program of its author: it may fail in any way
            raise _cannot_load(name, error, options, is_online=is_online) from error
        if refused:
            raise _downloaded_metric(refused[0])
        for part in loaded:
            loaded[part] |= found.get(part, {})
    return loaded


def _find_tasks(options: HarnessOptions) -> tuple[Any, list[str]]:
    """The index of lm_eval that knows the tasks, and their names or paths in it.

    lm_eval's own tasks take 10 s to list, so they are left out where the local ones suffice.
    """
    from lm_eval.tasks import TaskManager

    for folder in options.include:
        if not folder.is_dir():
            raise NotFoundError(
                f"--include {folder}: there is no such folder", hint="name a folder of .yaml tasks"
            )
    folders, names, is_local = list(options.include), [], True
    for task in options.tasks:
        path = Path(task).expanduser()
        if not (os.sep in task or path.suffix in (".yaml", ".yml")):
            names.append(task)
        elif path.is_dir():
            folders.append(path)
            names += _tasks_of_folder(path)
        elif path.is_file():
            names.append(str(path))
            is_local = is_local and "\ngroup:" not in f"\n{path.read_text(encoding='utf-8')}"
        else:
            raise NotFoundError(
                f"there is no task file {task}",
                hint="a name without a slash is looked for among lm_eval's own tasks",
            )
    local = TaskManager(include_path=folders, include_defaults=False)
    wanted = [name for name in names if not Path(name).is_file()]
    if is_local and set(wanted) <= set(local.all_subtasks):
        return local, names
    manager = TaskManager(include_path=folders)
    for name in wanted:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UsageError(
                f"task '{name}' is not known to lm_eval",
                hint=f"did you mean {', '.join(near)}?"
                if near
                else "`lm_eval ls tasks` lists them; a file of your own is named by its path, "
                "./mine.yaml",
            )
    return manager, names


def _tasks_of_folder(folder: Path) -> list[str]:
    from lm_eval.tasks import TaskManager

    names = TaskManager(include_path=[folder], include_defaults=False).all_subtasks
    if not names:
        raise DataSourceError(
            f"{folder} holds no task", hint="a task is a .yaml file with `task: NAME` in it"
        )
    return list(names)


def _set_up(tasks: dict[str, Any], num_fewshot: int | None, progress: Progress) -> None:
    """What lm_eval's `simple_evaluate` does with the tasks; one that is made for zero shots stays
    so."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(
                f"task '{name}' runs the code that the model writes, which is not done here",
                hint="choose another task",
            )
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"task '{name}' is not of text alone", hint="choose another task")
        own = task.get_config("num_fewshot")
        if own != 0 and (num_fewshot is not None or own is None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        elif num_fewshot:
            progress.note(f"task '{name}' is made for no examples: --num-fewshot is not followed")
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _cannot_load(
    name: str, error: Exception, options: HarnessOptions, *, is_online: bool
) -> MoeToolError:
    import datasets

    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    reason = reason or type(error).__name__
    is_missing = isinstance(error, (ConnectionError, datasets.exceptions.DatasetNotFoundError))
    if is_missing and not is_online:
        return NotFoundError(
            f"task '{name}': {_why_offline(options)}, and its data is not in the local cache "
            f"({reason})",
            hint="run it once on a machine with network, or give a task of your own whose data "
            "lies on this machine",
        )
    kind = NotFoundError if is_missing else DataSourceError
    return kind(
        f"task '{name}' cannot be loaded: {reason}",
        hint="`lm_eval validate --tasks NAME` looks closer",
    )


def _why_offline(options: HarnessOptions) -> str:
    if options.offline:
        return "--offline forbids the network"
    if hub_is_forbidden():
        return "HF_HUB_OFFLINE forbids the network"
    return f"{hub_endpoint()} does not answer"


def _downloaded_metric(name: str) -> UsageError:
    return UsageError(
        f"the task's metric '{name}' is not lm_eval's own: its code would be downloaded and run, "
        "which is not done here",
        hint="choose a task with lm_eval's own metrics",
    )


@contextmanager
def _no_downloaded_metrics() -> Iterator[list[str]]:
    """Refuse metrics whose code the `evaluate` library would download; yields the names of those
    that were asked for, since lm_eval swallows the refusal."""
    import evaluate

    refused: list[str] = []

    def refuse(name: str, *_: object, **__: object) -> None:
        refused.append(name)
        raise _downloaded_metric(name)

    load: Callable[..., Any] = evaluate.load
    evaluate.load = refuse
    try:
        yield refused
    finally:
        evaluate.load = load


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
