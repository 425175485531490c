"""What tasks of lm_eval gave, as a table for a terminal."""

from collections.abc import Iterable
from typing import Protocol

from rich import box
from rich.table import Table


class MetricFigures(Protocol):
    """One figure of one task or group."""

    @property
    def task(self) -> str: ...
    @property
    def filter(self) -> str: ...
    @property
    def shots(self) -> int | None: ...
    @property
    def samples(self) -> int | None: ...
    @property
    def metric(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def stderr(self) -> float | None: ...
    @property
    def higher_is_better(self) -> bool | None: ...


def harness_table(rows: Iterable[MetricFigures]) -> Table:
    """Return a row per figure; an arrow says which way is better."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("task", "filter", "metric"):
        table.add_column(title)
    for title in ("shots", "documents", "value", "± stderr"):
        table.add_column(title, justify="right")
    for row in rows:
        arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
        table.add_row(
            row.task,
            row.filter,
            f"{row.metric}{arrow}",
            "" if row.shots is None else str(row.shots),
            "" if row.samples is None else str(row.samples),
            f"{row.value:.4f}",
            "" if row.stderr is None else f"{row.stderr:.4f}",
        )
    return table
