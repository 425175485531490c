"""What a plan reads per token beside plain LRU and Belady's bound, counted by the engine.

    python benchmarks/plan_versus_lru.py PROFILE BUNDLE --text FILE... [--budgets 25,50,75]
        [--tokens 2048] [--seq-len 256] [--out rows.jsonl]

The plan is made from the profile for each budget (a share of the experts); then text that the
profile has not seen goes through the bundle token by token, exactly, once under the planned
eviction policy and once under LRU. The bound replays the very calls of that run.
"""

import argparse
import json
from pathlib import Path

import torch
from moe_tool.simulator.access_trace import AccessTrace
from result_rows import print_table, record_rows

from moe_tool.artifacts.run_stats import RunStats
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.hardware.shipped import shipped_profile
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.planning.build_plan import build_plan
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import read_sources
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.simulator.replay import Replayer


def read_sequences(paths: list[Path], folder: Path, n_tokens: int, seq_len: int) -> list[list[int]]:
    """Return sequences of the files in turn, no more tokens than asked for."""
    tokenizer = load_tokenizer(folder)
    by_file = []
    for path in paths:
        text = path.read_text(encoding="utf-8")[: 40 * n_tokens]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        by_file.append([ids[i : i + seq_len] for i in range(0, len(ids) - seq_len, seq_len)])
    turns = [sequence for row in zip(*by_file, strict=False) for sequence in row]
    return turns[: max(1, n_tokens // seq_len)]


@torch.inference_mode()
def run(bundle: Path, budget: int, eviction: str, sequences: list[list[int]]) -> dict[str, float]:
    """Return bytes per token and hits of one run, and what Belady would have read."""
    options = run_options(
        memory=f"{budget}%", eviction=eviction, context=len(sequences[0]), record_trace=True
    )
    with open_session(bundle, options) as session:
        session.prompt_tokens = 0  # every position counts as decoding
        session.runner.stats = RunStats()
        for sequence in sequences:
            cache = session.new_cache()
            for token in sequence:
                ids = torch.tensor([[token]])
                session.model(input_ids=ids, past_key_values=cache, use_cache=True)
        decode = session.runner.stats.decode
        assert session.runner.recorder is not None
        calls, shape = session.runner.recorder.recorded(), session.manifest.shape
        trace = AccessTrace(
            n_layers=len(shape.layers),
            n_experts=shape.experts,
            layer=calls.layer,
            start=calls.start,
            keys=calls.keys,
            forward=calls.layer.cumsum() * 0,
        )
        bound = Replayer(trace).belady(session.plan.memory.n_slots)
        record = session.manifest.primaries[0].record_size_bytes
        return {
            "bytes_per_token": decode.bytes_read / decode.tokens,
            "hit_rate": decode.hit_rate,
            "bound": (len(trace.keys) - int(bound.hits.sum())) * record / decode.tokens,
        }


def main() -> None:
    """Plan, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("bundle", type=Path, help="packed with the profile, at 4 bits")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--budgets", default="25,50,75")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=Path, help="append raw rows as JSON lines")
    a = parser.parse_args()
    sequences = read_sequences(a.text, a.bundle, a.tokens, a.seq_len)
    table, ratios = [], []
    with ProfileReader.open(a.profile) as profile, record_rows(a.out, vars(a)) as rows:
        sources, machine = read_sources(profile), shipped_profile("laptop-16gb")
        for budget in map(int, a.budgets.split(",")):
            request = PlanRequest(memory=f"{budget}%", bits="4", context=a.seq_len)
            plan = build_plan(sources, machine, request).plan
            planned = run(a.bundle, budget, plan.eviction, sequences)
            lru = run(a.bundle, budget, "lru", sequences)
            ratio = planned["bytes_per_token"] / lru["bytes_per_token"]
            ratios.append(ratio)
            rows.add("row", budget=budget, eviction=plan.eviction, planned=planned, lru=lru)
            cells = [planned["bytes_per_token"], lru["bytes_per_token"], lru["bound"]]
            table.append(
                [
                    f"{budget} %",
                    plan.eviction,
                    *(f"{cell / 1e3:.1f}" for cell in cells),
                    f"{ratio:.3f}",
                    f"{planned['bytes_per_token'] / lru['bound']:.2f}",
                ]
            )
    header = ("budget", "planned", "KB/token", "lru", "belady", "to lru", "to belady")
    print_table(header, table)
    print(json.dumps({"best": min(ratios), "worst": max(ratios)}))


if __name__ == "__main__":
    main()
