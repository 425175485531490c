"""Tokens per second as `simulate` predicts them beside those of the run that it replays.

    python benchmarks/prediction_error.py BUNDLE... [--budgets 20,40,60,80,100] [--tokens 64]
        [--rounds 3] [--eviction lru] [--hardware FILE] [--out rows.jsonl]

In every round each bundle runs at each budget, once to fill the cache and once that counts, and
records its trace. Before each bundle the machine is measured (`hardware --quick`, on the disk of
the bundle), since a shared one changes from minute to minute; each run is predicted from that.
Medians over the rounds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from child_runs import run_program
from result_rows import print_table, record_rows

from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.run_trace_hdf5 import read_run_trace
from moe_tool.planning.compare_run import RunComparison, compare_run


def measure_machine(folder: Path, disk: Path) -> HardwareProfile:
    """Return this machine as it is now."""
    out = folder / "hardware.json"
    words = ["hardware", "--quick", "--disk", str(disk), "--out", str(out)]
    outcome = run_program(
        [sys.executable, "-m", "moe_tool", *words, "--json"],
        environment=dict(os.environ),
        timeout_s=300,
    )
    if outcome.failure is not None:
        raise SystemExit(f"error: hardware: {outcome.failure}")
    return read_json_artifact(out, HardwareProfile)


def run_once(bundle: Path, budget: int, a: argparse.Namespace, folder: Path) -> Path:
    """Run and return the trace."""
    trace = folder / "run.h5"
    program = Path(__file__).parent / "traced_run.py"
    words = [bundle, f"{budget}%", str(a.tokens), a.eviction, str(a.threads), trace]
    environment = {"GOMP_SPINCOUNT": "100000", **os.environ}  # as `moe-tool run` has it
    outcome = run_program([sys.executable, program, *words], environment=environment, timeout_s=600)
    if outcome.failure is not None:
        raise SystemExit(f"error: {bundle.name} at {budget} %: {outcome.failure}")
    return trace


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def main() -> None:
    """Run, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--budgets", type=_numbers, default=(20, 40, 60, 80, 100))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eviction", default="lru")
    parser.add_argument("--hardware", type=Path, help="measured before; none is measured then")
    parser.add_argument("--out", type=Path, help="append raw rows as JSON lines")
    a = parser.parse_args()
    found: dict[tuple[str, int], list[RunComparison]] = {}
    with tempfile.TemporaryDirectory() as name, record_rows(a.out, vars(a)) as rows:
        folder = Path(name)
        for number in range(a.rounds):
            for bundle in a.bundles:
                if a.hardware is None:
                    machine = measure_machine(folder, bundle.parent)
                else:
                    machine = read_json_artifact(a.hardware, HardwareProfile)
                for budget in a.budgets:
                    report = compare_run(
                        *read_run_trace(run_once(bundle, budget, a, folder)), machine
                    )
                    assert report.is_equal, f"{bundle} at {budget} %: the counts differ"
                    found.setdefault((bundle.name, budget), []).append(report)
                    rows.add("row", bundle=bundle.name, budget=budget, **asdict(report))
                    print(
                        f"round {number + 1}, {bundle.name} at {budget} %: "
                        f"{report.tokens_per_second:.2f} tokens/s, predicted "
                        f"{report.predicted_tokens_per_second:.2f}",
                        file=sys.stderr,
                    )
    table, errors = [], []
    for (bundle_name, budget), reports in found.items():
        measured = statistics.median(each.tokens_per_second for each in reports)
        predicted = statistics.median(each.predicted_tokens_per_second for each in reports)
        stall = statistics.median(each.stall_ms for each in reports)
        predicted_stall = statistics.median(each.predicted_stall_ms for each in reports)
        errors.append(abs(predicted / measured - 1))
        table.append(
            [
                bundle_name,
                f"{budget} %",
                f"{measured:.2f}",
                f"{predicted:.2f}",
                f"{100 * (predicted / measured - 1):+.0f}",
                f"{stall:.1f}",
                f"{predicted_stall:.1f}",
            ]
        )
    header = ("bundle", "budget", "tokens/s", "predicted", "%", "stall ms", "predicted ms")
    print_table(header, table)
    print(json.dumps({"largest_error": max(errors), "mean_error": statistics.fmean(errors)}))


if __name__ == "__main__":
    main()
