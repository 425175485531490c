"""Rounds of outcomes as one table: ours, theirs, their ratio and whether it is enough."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from child_runs import Outcome
from result_rows import RowFile, spread_of

HEADER = ("case", "ours", "theirs", "ratio", "target", "met")
_STALL_TARGET = 1.15
_EQUAL_WITHIN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that was measured, by name, in the order of the rounds."""

    rows: RowFile
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    disk: dict[str, list[float]] = field(default_factory=dict)
    """Bytes per second, by limit"""

    def add(self, number: int, name: str, outcome: Outcome) -> None:
        """Keep one outcome, here and in the file of rows."""
        self.outcomes.setdefault(name, []).append(outcome)
        self.rows.add("run", round=number, name=name, **asdict(outcome))

    def add_disk(self, number: int, name: str, bytes_per_s: float) -> None:
        """Keep what the disk gave in one round."""
        self.disk.setdefault(name, []).append(bytes_per_s)

    def finished(self, name: str) -> list[Outcome]:
        """Return the runs that came to their end."""
        return [outcome for outcome in self.outcomes[name] if outcome.failure is None]


def table_cells(results: Results, cases: set[str], limits: dict[str, int]) -> list[list[str]]:
    """Return the rows of the table.

    Args:
        results: of all rounds.
        cases: those that were run.
        limits: bytes, by case.
    """
    table = []
    if "resident" in cases:
        table.append(_rates(results, "decode, resident", "ours resident", "theirs resident", 1.0))
    for name, limit_bytes in limits.items():
        if name in cases:
            label = f"decode, {limit_bytes / 1e6:.0f} MB hard limit ({name})"
            table.append(_rates(results, label, f"ours {name}", f"theirs {name}", 2.5))
            table.append(_peaks(results, name, limit_bytes))
            table.append(_against_free(results, name))
        if name in results.disk and "stall" in cases:
            table.append(_stall(results, name, f"ours {name} without the limit"))
            if name in cases:
                table.append(_stall(results, name, f"ours {name}"))
    if "prefill" in cases:
        table.append(_rates(results, "prefill", "ours prefill", "theirs prefill", 0.5))
        table.append(_chunks(results))
    return table


def _rates(results: Results, label: str, ours: str, theirs: str, target: float) -> list[str]:
    ratio = _ratio(results, ours, theirs, _rate)
    return [
        f"{label}, tokens/s",
        _cell(results, ours, _rate),
        _cell(results, theirs, _rate),
        _ratio_cell(ratio),
        f">= {target}",
        _met(ratio is not None and ratio >= target),
    ]


def _against_free(results: Results, name: str) -> list[str]:
    free = f"ours {name} without the limit"
    ratio = _ratio(results, f"ours {name}", free, _rate)
    disk = spread_of([rate / 1e9 for rate in results.disk[name]])
    return [
        f"  with the limit / same budget without it; disk {disk} GB/s",
        _cell(results, f"ours {name}", _rate),
        _cell(results, free, _rate),
        _ratio_cell(ratio),
        f"1 +- {_EQUAL_WITHIN}",
        _met(ratio is not None and abs(ratio - 1) <= _EQUAL_WITHIN),
    ]


def _peaks(results: Results, name: str, limit_bytes: int) -> list[str]:
    survived = all(outcome.failure is None for outcome in results.outcomes[f"ours {name}"])
    return [
        "  peak memory, page cache included, MB",
        _cell(results, f"ours {name}", _peak_mb),
        _cell(results, f"theirs {name}", _peak_mb),
        "",
        f"alive within {limit_bytes / 1e6:.0f}",
        _met(survived),
    ]


def _stall(results: Results, name: str, run: str) -> list[str]:
    """Stalled time per token against what the missed bytes take at the disk's own speed, each round
    by its own measurement of the disk."""
    stalls, floors = [], []
    for outcome, bytes_per_s in zip(results.outcomes[run], results.disk[name], strict=True):
        if outcome.failure is None:
            stalls.append(1e3 * outcome.fields["stall_seconds"] / outcome.fields["tokens"])
            floors.append(1e3 * outcome.fields["bytes_per_token"] / bytes_per_s)
    ratios = [stall / floor for stall, floor in zip(stalls, floors, strict=True) if floor]
    ratio = statistics.median(ratios) if ratios else None
    return [
        f"  stalled / missed bytes at the disk's speed ({run}), ms per token",
        str(spread_of(stalls)) if stalls else _cell(results, run, _rate),
        str(spread_of(floors)) if floors else "",
        str(spread_of(ratios)) if ratios else "nothing missed" if stalls else "",
        f"<= {_STALL_TARGET}",
        _met(ratio is not None and ratio <= _STALL_TARGET),
    ]


def _chunks(results: Results) -> list[str]:
    """What one chunk for the whole prompt would give; for information."""

    def in_one(outcome: Outcome) -> float:
        return float(list(outcome.fields["by_chunk"].values())[-1])

    finished = results.finished("ours prefill")
    chunk = finished[0].fields["session_chunk"] if finished else "?"
    return [
        f"  the prompt in one chunk instead of {chunk} tokens, tokens/s",
        _cell(results, "ours prefill", in_one),
        _cell(results, "theirs prefill", _rate),
        _ratio_cell(_ratio(results, "ours prefill", "theirs prefill", in_one)),
        "",
        "",
    ]


def _ratio(
    results: Results, ours: str, theirs: str, of_ours: Callable[[Outcome], float]
) -> float | None:
    mine, others = results.finished(ours), results.finished(theirs)
    if not (mine and others):
        return None
    return statistics.median(map(of_ours, mine)) / statistics.median(map(_rate, others))


def _cell(results: Results, name: str, value: Callable[[Outcome], float]) -> str:
    failures = Counter(o.failure for o in results.outcomes[name] if o.failure is not None)
    words = [f"{count} x {failure}" for failure, count in failures.items()]
    values: Sequence[float] = [value(outcome) for outcome in results.finished(name)]
    return ", ".join([*([str(spread_of(values))] if values else []), *words])


def _rate(outcome: Outcome) -> float:
    return outcome.tokens_per_second


def _peak_mb(outcome: Outcome) -> float:
    return (outcome.peak_bytes or 0) / 1e6


def _ratio_cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _met(is_met: bool) -> str:
    return "yes" if is_met else "NO"
