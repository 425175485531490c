"""Decode speed as budget, layers, experts and tokens at once grow, and what explains it.

    python benchmarks/cost_as_it_grows.py SHARED_BENCH_FOLDER [--work DIR] [--threads 2]
        [--hidden 1024 --ff 1024 --top-k 2] [--layers 4,8,16,32] [--experts 8,16,32,64]
        [--budgets 20,40,60,80,100] [--at-once 1,2,4,8,16,32,64] [--forwards 32] [--out rows.jsonl]

SHARED_BENCH_FOLDER holds make_random_moe.py; bundles stay in --work for the next time, checkpoints
go as soon as they are packed. Budgets are shares of the experts that have a slot, at 16 layers of 8
experts; layers grow at 8 experts, experts at 4 layers, tokens at once at 16 layers. All have two
active experts per token, so growing experts cost no more bytes.

The time of a forward is then explained by a fixed term per layer, bytes touched over the bandwidth
of memory, and bytes missed over that of the disk, fitted by least squares of the relative errors;
a second fit gives the multiply-adds of many tokens a term of their own.
"""

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from child_runs import run_program
from cost_fit import Cost, Fit, fit_costs
from disk_bandwidth import measure_disk
from interleaved import time_in_turn
from random_models import ModelMaker, ModelShape, require_programs
from read_bandwidth import SIZE_BYTES, reading_calls
from result_rows import print_table, record_rows

_HERE = Path(__file__).parent
_HEAD_DIM = 64
_MANY_TOKENS = 8
_CLOSE = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row to measure."""

    series: str
    shape: ModelShape
    budget: int = 100
    """Percent of the experts"""
    at_once: int = 1

    @property
    def label(self) -> str:
        """Return what it is called in the table."""
        return f"{self.shape.layers} layers, {self.shape.experts} experts, {self.budget} %, " + (
            "1 token" if self.at_once == 1 else f"{self.at_once} tokens"
        )


def list_points(a: argparse.Namespace) -> list[Point]:
    """Return every row, series by series; one that two series share is measured once."""

    def shape(layers: int, experts: int) -> ModelShape:
        return ModelShape(
            layers=layers, experts=experts, hidden=a.hidden, ff=a.ff, top_k=a.top_k, vocab=a.vocab
        )

    few, middle, fewest = min(a.layers), sorted(a.layers)[len(a.layers) // 2], min(a.experts)
    points = [
        *(Point(series="budget", shape=shape(middle, fewest), budget=b) for b in a.budgets),
        *(Point(series="layers", shape=shape(n, fewest)) for n in a.layers),
        *(Point(series="experts", shape=shape(few, n)) for n in a.experts),
        *(Point(series="tokens", shape=shape(middle, fewest), at_once=n) for n in a.at_once),
    ]
    seen: dict[str, Point] = {}
    for point in points:
        seen.setdefault(point.label, point)
    return list(seen.values())


def measure(point: Point, bundle: Path, a: argparse.Namespace) -> tuple[Cost, dict[str, Any]]:
    """Return what a point costs, with the raw figures of its run."""
    forwards = a.forwards if point.at_once <= _MANY_TOKENS else max(4, a.forwards // 4)
    command = [sys.executable, _HERE / "decode_speed.py", bundle, "--memory", f"{point.budget}%"]
    numbers = {
        "tokens": forwards,
        "warmup": a.forwards // 4,
        "threads": a.threads,
        "vocab": a.vocab,
        "at-once": point.at_once,
    }
    options = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    environment = {"GOMP_SPINCOUNT": "100000", **os.environ}  # as `moe-tool run` has it
    outcome = run_program([*command, *options], environment=environment, timeout_s=600)
    if outcome.failure is not None:
        raise SystemExit(f"error: {point.label}: {outcome.failure}")
    found = outcome.fields
    record = found["record_bytes"]
    accesses = (found["hits"] + found["misses"]) / forwards
    shape = point.shape
    per_token = shape.layers * shape.top_k * 3 * shape.hidden * shape.ff + _skeleton_products(shape)
    cost = Cost(
        label=point.label,
        layers=shape.layers,
        touched_bytes=accesses * record + found["skeleton_bytes"],
        missed_bytes=found["misses"] / forwards * record,
        products=point.at_once * per_token,
        seconds=_forward_seconds(found, point.at_once),
        tokens=point.at_once,
    )
    print(f"{point.label}: {found['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
    return cost, found


def _forward_seconds(found: dict[str, Any], at_once: int) -> float:
    """The median forward where all are alike, the mean where misses come as they come."""
    if found["misses"]:
        return at_once / float(found["tokens_per_second"])
    return float(found["median_ms"]) / 1e3


def _skeleton_products(shape: ModelShape) -> int:
    """Attention's four matrices and the head, as make_random_moe.py shapes them."""
    heads = shape.hidden // _HEAD_DIM
    kv_width = max(1, heads // 4) * _HEAD_DIM
    return shape.layers * 2 * shape.hidden * (shape.hidden + kv_width) + shape.vocab * shape.hidden


def memory_bandwidth(n_threads: int) -> float:
    """Return the bytes per second of the fastest way of reading a large buffer."""
    torch.set_num_threads(n_threads)
    seconds = time_in_turn(reading_calls(n_threads), repetitions=5)
    return SIZE_BYTES / min(sorted(values)[len(values) // 2] for values in seconds.values())


def table_cells(costs: list[Cost], plain: Fit, fuller: Fit) -> list[list[str]]:
    """Return measured, predicted and error of every row, by both fits."""
    table = []
    for cost in costs:
        cells = [
            cost.label,
            f"{cost.tokens / cost.seconds:.1f}",
            f"{cost.touched_bytes / 1e6:.1f}",
            f"{cost.missed_bytes / 1e6:.1f}",
            f"{1e3 * cost.seconds:.2f}",
        ]
        for fit in (plain, fuller):
            predicted = fit.seconds(cost)
            cells += [f"{1e3 * predicted:.2f}", f"{100 * (predicted / cost.seconds - 1):+.0f}"]
        table.append(cells)
    return table


def _n_close(costs: list[Cost], fit: Fit) -> int:
    return sum(abs(fit.seconds(cost) / cost.seconds - 1) <= _CLOSE for cost in costs)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path, metavar="SHARED_BENCH_FOLDER")
    parser.add_argument("--work", type=Path, default=Path("build/cost"))
    parser.add_argument("--threads", type=int, default=2)
    for name, value in (("hidden", 1024), ("ff", 1024), ("top-k", 2), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--layers", type=_numbers, default=(4, 8, 16, 32))
    parser.add_argument("--experts", type=_numbers, default=(8, 16, 32, 64))
    parser.add_argument("--budgets", type=_numbers, default=(20, 40, 60, 80, 100))
    parser.add_argument("--at-once", type=_numbers, default=(1, 2, 4, 8, 16, 32, 64))
    parser.add_argument("--forwards", type=int, default=32, help="of each row")
    parser.add_argument("--out", type=Path, help="append raw rows as JSON lines")
    return parser


def main() -> None:
    """Make the models, measure, fit, print."""
    a = _parser().parse_args()
    require_programs(a.shared, ("make_random_moe.py",))
    a.work.mkdir(parents=True, exist_ok=True)
    maker = ModelMaker(shared=a.shared, work=a.work)
    points = list_points(a)
    bundles = {p.shape: maker.bundle(p.shape, delete_checkpoint=True) for p in points}
    costs = []
    with record_rows(a.out, vars(a)) as rows:
        memory = memory_bandwidth(a.threads)
        disk = measure_disk(bundles[points[0].shape], max_bytes=2**29)
        rows.add("limits", memory_bytes_per_s=memory, disk=asdict(disk))
        for point in points:
            cost, found = measure(point, bundles[point.shape], a)
            rows.add("row", series=point.series, cost=asdict(cost), found=found)
            costs.append(cost)
    plain = fit_costs(costs, with_products=False)
    fuller = fit_costs(costs, with_products=True)
    print(f"measured: memory {memory / 1e9:.1f} GB/s, disk {disk.bytes_per_s / 1e9:.2f} GB/s")
    for name, fit in (("fit", plain), ("fit +", fuller)):
        print(f"{name}: {fit}; {_n_close(costs, fit)} of {len(costs)} rows within 15 %")
    header = ("row", "tokens/s", "MB touched", "MB missed", "ms measured")
    print()
    print_table((*header, "fit, ms", "%", "fit +, ms", "%"), table_cells(costs, plain, fuller))


if __name__ == "__main__":
    main()
