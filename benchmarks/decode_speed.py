"""Decode seeded random token ids one at a time, and print one JSON line.

    python benchmarks/decode_speed.py BUNDLE [--tokens 64] [--warmup 8] [--threads 2] [--memory X]

Random ids are right for random weights alone, to measure beside another program that is fed the
same ids; `moe-tool bench` takes text.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.run_stats import RunStats
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.runtime.session import RunOptions, open_session


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
    a = parser.parse_args()
    start = time.perf_counter()
    options = RunOptions(memory=a.memory, threads=a.threads, context=a.warmup + a.tokens, prompt=1)
    with open_session(a.bundle, options, tokenizer=object()) as session:
        load_s = time.perf_counter() - start
        rng, latency = np.random.default_rng(1), []
        cache = session.new_cache()
        session.prompt_tokens = 0  # every position counts as decode
        for position in range(a.warmup + a.tokens):
            if position == a.warmup:
                session.runner.stats = RunStats()
            ids = torch.tensor([[int(rng.integers(2, a.vocab))]])
            began = time.perf_counter()
            session.model(input_ids=ids, past_key_values=cache, use_cache=True)
            latency.append(time.perf_counter() - began)
        decode = session.runner.stats.decode
        x = np.array(latency[a.warmup :])
        fields = {
            "tokens_per_second": round(1 / x.mean(), 3),
            "median_ms": round(float(np.median(x)) * 1e3, 1),
            "p99_ms": round(float(np.percentile(x, 99)) * 1e3, 1),
            "hit_rate": round(decode.hit_rate, 4),
            "bytes_per_token": decode.bytes_read / a.tokens,
            "stall_seconds": decode.stall_seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "slots": session.plan.n_slots,
            "load_s": round(load_s, 2),
            "load_average": os.getloadavg()[0],
            "tokens": a.tokens,
            "threads": a.threads,
        }
    print(json.dumps(fields))


if __name__ == "__main__":
    main()
