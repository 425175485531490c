"""moe-tool beside llama.cpp on the same shape, the two in turn, in one table.

    pip install 'moe-tool[versus]'      # builds llama.cpp: ~10 minutes on 2 cores
    python benchmarks/versus_llama_cpp.py SHARED_BENCH_FOLDER [--work DIR] [--rounds 3]
        [--threads 2] [--layers 16 --hidden 2048 --ff 7168 --experts 8 --top-k 2 --vocab 4096]
        [--limits 50%,30%] [--tokens 64] [--cases resident,limit50,limit30,prefill,stall]
        [--delete-checkpoint] [--out rows.jsonl]

SHARED_BENCH_FOLDER holds make_random_moe.py, make_gguf.py, llama_decode.py and with_memory_limit.
Models are made once, into --work: 12 GB of checkpoint, which may be deleted afterwards, and two
times 3.3 GB. Limits are shares of the GGUF and need root. Per round every run is a process of its
own, with the same threads and the same seeded random token ids; llama.cpp at its best in each case:
repacking on when resident, off under a limit, where repacking gets it killed.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from child_runs import MemoryLimit, Outcome, run_program
from disk_bandwidth import measure_disk
from machine import drop_page_caches
from random_models import (
    ModelMaker,
    add_shape_options,
    exit_with_hint,
    require_programs,
    shape_of,
)
from result_rows import print_table, record_rows
from versus_table import HEADER, Results, table_cells

_HERE = Path(__file__).parent
_PROGRAMS = ("make_random_moe.py", "make_gguf.py", "llama_decode.py", "with_memory_limit")
_BUDGET_SHARE = 1 / 1.05
"""A limit is the budget plus 5 %"""
_DISK_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """How each program is called."""

    shared: Path
    bundle: Path
    gguf: Path
    arguments: argparse.Namespace

    def ours(self, *, memory: str, tokens: int, warmup: int, limit_bytes: int | None) -> Outcome:
        """Decode with moe-tool."""
        script = [_HERE / "decode_speed.py", self.bundle, "--memory", memory]
        return self._run([*script, *self._counts(tokens, warmup)], limit_bytes)

    def theirs(self, *, tokens: int, warmup: int, limit_bytes: int | None) -> Outcome:
        """Decode with llama.cpp; repacking is off under a limit."""
        script = [self.shared / "llama_decode.py", self.gguf, *self._counts(tokens, warmup)]
        return self._run([*script, *(["--no-repack"] if limit_bytes else [])], limit_bytes)

    def our_prefill(self) -> Outcome:
        """Push a prompt through moe-tool, in the chunks of a session and in one."""
        n_tokens = self.arguments.prompt_tokens
        script = [_HERE / "prefill_speed.py", self.bundle, "--chunks", f"session,{n_tokens}"]
        return self._run([*script, *self._common(n_tokens)], None)

    def their_prefill(self) -> Outcome:
        """Push a prompt through llama.cpp."""
        script = [_HERE / "llama_prefill.py", self.gguf]
        return self._run([*script, *self._common(self.arguments.prompt_tokens)], None)

    def _counts(self, tokens: int, warmup: int) -> list[str]:
        return ["--warmup", str(warmup), *self._common(tokens)]

    def _common(self, tokens: int) -> list[str]:
        a = self.arguments
        return ["--tokens", str(tokens), "--threads", str(a.threads), "--vocab", str(a.vocab)]

    def _run(self, words: list[str | Path], limit_bytes: int | None) -> Outcome:
        limit = None
        if limit_bytes is not None:
            limit = MemoryLimit(
                program=(self.shared / "with_memory_limit").resolve(), size_bytes=limit_bytes
            )
        # torch's idle threads stop spinning early, as `moe-tool run` has it
        environment = {"GOMP_SPINCOUNT": "100000", **os.environ}
        return run_program(
            [sys.executable, *words],
            environment=environment,
            timeout_s=self.arguments.timeout,
            limit=limit,
        )


def run_round(
    runs: Runs, cases: set[str], limits: dict[str, int], number: int, results: Results
) -> None:
    """Run every case once, the order within a case turned around in every other round."""
    a = runs.arguments
    note = _Notes(results=results, number=number)
    if "resident" in cases:
        counts = {"tokens": a.tokens, "warmup": a.warmup, "limit_bytes": None}
        note.in_turn(
            {
                "ours resident": lambda: runs.ours(memory="100%", **counts),
                "theirs resident": lambda: runs.theirs(**counts),
            }
        )
    for name, limit_bytes in limits.items():
        is_full = name in cases
        if not (is_full or "stall" in cases):
            continue
        budget = str(int(limit_bytes * _BUDGET_SHARE))
        note.disk(name, runs.bundle)
        steps = {f"ours {name} without the limit": lambda b=budget: _cold(runs, a, b)}
        if is_full:
            steps[f"ours {name}"] = lambda b=budget, limit=limit_bytes: runs.ours(
                memory=b, tokens=a.limited_tokens, warmup=a.limited_warmup, limit_bytes=limit
            )
            steps[f"theirs {name}"] = lambda limit=limit_bytes: runs.theirs(
                tokens=a.llama_limited_tokens, warmup=a.limited_warmup, limit_bytes=limit
            )
        note.in_turn(steps)
    if "prefill" in cases:
        note.in_turn({"ours prefill": runs.our_prefill, "theirs prefill": runs.their_prefill})


def _cold(runs: Runs, a: argparse.Namespace, budget: str) -> Outcome:
    drop_page_caches()
    return runs.ours(
        memory=budget, tokens=a.limited_tokens, warmup=a.limited_warmup, limit_bytes=None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notes:
    """Where one round's outcomes go."""

    results: Results
    number: int

    def in_turn(self, steps: dict[str, Callable[[], Outcome]]) -> None:
        names = list(steps)
        for name in names if self.number % 2 == 0 else reversed(names):
            start = time.perf_counter()
            outcome = steps[name]()
            self.results.add(self.number, name, outcome)
            said = outcome.failure or f"{outcome.tokens_per_second:.3f} tokens/s"
            seconds = time.perf_counter() - start
            print(f"round {self.number + 1}, {name}: {said} ({seconds:.0f} s)", file=sys.stderr)

    def disk(self, name: str, bundle: Path) -> None:
        found = measure_disk(bundle, max_bytes=_DISK_BYTES)
        self.results.add_disk(self.number, name, found.bytes_per_s)
        self.results.rows.add("disk", round=self.number, case=name, **asdict(found))
        rate = found.bytes_per_s / 1e9
        print(f"round {self.number + 1}, disk: {rate:.2f} GB/s", file=sys.stderr)


def _limit_sizes(shares: str, gguf_bytes: int) -> dict[str, int]:
    """Return the limits by case: {"limit50": 1640 MB, ...}."""
    percents = [share.strip().rstrip("%") for share in shares.split(",") if share.strip()]
    return {f"limit{percent}": int(gguf_bytes * float(percent) / 100) for percent in percents}


def _check(a: argparse.Namespace) -> set[str]:
    """Return the cases; exit with 2 where something is missing that they need."""
    require_programs(a.shared, _PROGRAMS)
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            exit_with_hint(f"{package} is not installed", "pip install 'moe-tool[versus]'")
    limits = list(_limit_sizes(a.limits, 0))
    known = ["resident", *limits, "prefill", "stall"]
    cases = set(known if a.cases is None else a.cases.split(","))
    if not cases <= set(known):
        exit_with_hint(
            f"--cases {a.cases}: {', '.join(sorted(cases - set(known)))} is not known",
            f"choose from {','.join(known)}",
        )
    if cases & set(limits) and os.geteuid() != 0:
        exit_with_hint("a memory limit needs root", "run as root, or --cases resident,prefill")
    if a.hidden % 256 or a.ff % 256:
        exit_with_hint("llama.cpp's blocks do not fit", "--hidden and --ff in steps of 256")
    return cases


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path, metavar="SHARED_BENCH_FOLDER")
    parser.add_argument("--work", type=Path, default=Path("build/versus"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_shape_options(parser)
    parser.add_argument("--limits", default="50%,30%", help="shares of the GGUF")
    parser.add_argument("--tokens", type=int, default=64, help="decoded when all is resident")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--limited-tokens", type=int, default=32, help="ours, under a limit")
    parser.add_argument("--llama-limited-tokens", type=int, default=12)
    parser.add_argument("--limited-warmup", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--cases", help="default: all")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one run")
    parser.add_argument("--delete-checkpoint", action="store_true")
    parser.add_argument("--out", type=Path, help="append raw rows as JSON lines")
    return parser


def main() -> None:
    """Make the models, run the rounds, print the table."""
    a = _parser().parse_args()
    cases = _check(a)
    a.work.mkdir(parents=True, exist_ok=True)
    maker = ModelMaker(shared=a.shared, work=a.work)
    shape = shape_of(a)
    bundle = maker.bundle(shape, delete_checkpoint=a.delete_checkpoint)
    gguf = maker.gguf(shape)
    limits = _limit_sizes(a.limits, gguf.stat().st_size)
    if cases.isdisjoint(limits):
        limits = dict(list(limits.items())[:1])  # a stall needs one budget
    runs = Runs(shared=a.shared, bundle=bundle, gguf=gguf, arguments=a)
    with record_rows(a.out, vars(a)) as rows:
        results = Results(rows=rows)
        for number in range(a.rounds):
            run_round(runs, cases, limits, number, results)
    print(f"{shape.name}, {a.threads} threads, {a.rounds} rounds, medians [lowest-highest]\n")
    print_table(HEADER, table_cells(results, cases, limits))


if __name__ == "__main__":
    main()
