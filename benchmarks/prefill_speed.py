"""Push a prompt of seeded random token ids through a bundle, and print one JSON line.

    python benchmarks/prefill_speed.py BUNDLE [--tokens 512] [--chunks session,512] [--threads 2]
        [--memory X]

Per size of chunk: one pass to warm up, then timed ones, each with an empty KV cache. `session` is
the chunk that `run` takes; others show what another size would give.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import MoeToolError
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.runtime.working_set import prefill_chunk


def prefill_seconds(session: Session, ids: torch.Tensor, chunk: int) -> float:
    """Return what one prompt takes; of its logits only the last token's are computed."""
    cache = DynamicCache(config=session.model.config)
    session.prompt_tokens = len(ids)
    start = time.perf_counter()
    for first in range(0, len(ids), chunk):
        part = ids[None, first : first + chunk]  # [1, T]
        session.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Prefill and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunks", default="session")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--memory", default="100%")
    a = parser.parse_args()
    options = run_options(
        memory=a.memory, threads=a.threads, context=a.tokens, prompt_tokens=a.tokens
    )
    with open_session(a.bundle, options, tokenizer=object()) as session:
        ids = torch.from_numpy(np.random.default_rng(1).integers(2, a.vocab, a.tokens))
        rates = {}
        for word in a.chunks.split(","):
            chunk = prefill_chunk(session.plan.workload) if word == "session" else int(word)
            prefill_seconds(session, ids, chunk)
            seconds = [prefill_seconds(session, ids, chunk) for _ in range(a.repetitions)]
            rates[word] = sum(a.tokens / value for value in seconds) / len(seconds)
        fields = {
            "tokens_per_second": round(next(iter(rates.values())), 3),
            "by_chunk": rates,
            "session_chunk": prefill_chunk(session.plan.workload),
            "peak_rss_bytes": peak_rss_bytes(),
            "load_average": os.getloadavg()[0],
            "tokens": a.tokens,
            "threads": a.threads,
        }
    print(json.dumps(fields))


if __name__ == "__main__":
    try:
        main()
    except MoeToolError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
