"""Decode seeded random token ids, and print one JSON line.

    python benchmarks/decode_speed.py BUNDLE [--tokens 64] [--warmup 8] [--threads 2] [--memory X]
        [--at-once 1]

Random ids are right for random weights alone, to measure beside another program that is fed the
same ids; `moe-tool bench` takes text. Tokens come one at a time, or --at-once of them in each of
--tokens forwards. Where every expert has a slot all are read before the warm-up.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.run_stats import RunStats
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import MoeToolError
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session

_TOUCHING_TOKENS = 256
"""So many random ones use every expert of a layer, as good as certainly"""


def read_all_experts(session: Session, vocabulary: int) -> None:
    """Fill the slots where there is one for every expert, as a program that holds the whole model
    has read it before it begins."""
    if session.plan.memory.n_slots < len(session.manifest.primary_records):
        return
    ids = np.random.default_rng(0).integers(2, vocabulary, (1, _TOUCHING_TOKENS))
    session.model(input_ids=torch.from_numpy(ids), use_cache=False, logits_to_keep=1)


def skeleton_bytes(session: Session) -> int:
    """Return what one forward reads of everything but the experts, as stored; of an embedding it
    reads a row."""
    with session.bundle.open_skeleton() as checkpoint:
        tensors = checkpoint.tensors.items()
        return sum(info.size_bytes for name, info in tensors if "embed" not in name)


@torch.inference_mode()
def main() -> None:
    """Decode and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--memory", default="100%")
    parser.add_argument("--at-once", type=int, default=1)
    a = parser.parse_args()
    start = time.perf_counter()
    context = (a.warmup + a.tokens) * a.at_once
    options = run_options(
        memory=a.memory, threads=a.threads, context=context, prompt_tokens=a.at_once
    )
    with open_session(a.bundle, options, tokenizer=object()) as session:
        read_all_experts(session, a.vocab)
        load_s = time.perf_counter() - start
        rng, latency = np.random.default_rng(1), []
        cache = session.new_cache()
        session.prompt_tokens = 0  # every position counts as decode
        for position in range(a.warmup + a.tokens):
            if position == a.warmup:
                session.runner.stats = RunStats()
            ids = torch.from_numpy(rng.integers(2, a.vocab, (1, a.at_once)))
            began = time.perf_counter()
            session.model(input_ids=ids, past_key_values=cache, use_cache=True)
            latency.append(time.perf_counter() - began)
        decode = session.runner.stats.decode
        x = np.array(latency[a.warmup :])
        fields = {
            "tokens_per_second": round(a.at_once / x.mean(), 3),
            "median_ms": round(float(np.median(x)) * 1e3, 3),
            "p99_ms": round(float(np.percentile(x, 99)) * 1e3, 1),
            "hit_rate": round(decode.hit_rate, 4),
            "hits": decode.hits,
            "misses": decode.misses,
            "record_bytes": session.manifest.primaries[0].record_size_bytes,
            "skeleton_bytes": skeleton_bytes(session),
            "bytes_per_token": decode.bytes_read / (a.tokens * a.at_once),
            "stall_seconds": decode.stall_seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "slots": session.plan.memory.n_slots,
            "load_s": round(load_s, 2),
            "load_average": os.getloadavg()[0],
            "tokens": a.tokens * a.at_once,
            "forwards": a.tokens,
            "threads": a.threads,
        }
    print(json.dumps(fields))


if __name__ == "__main__":
    try:
        main()
    except MoeToolError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
