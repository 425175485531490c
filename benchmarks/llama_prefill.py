"""Push a prompt of random token ids through llama.cpp in one batch, and print one JSON line.

    pip install 'moe-tool[versus]'
    python benchmarks/llama_prefill.py MODEL.gguf [--tokens 512] [--threads 2] [--no-repack]

The first pass warms up, then the KV cache is cleared before each timed one. Repacking and mmap are
on, as they are by default. The ids are those of prefill_speed.py.
"""

import argparse
import json
import time

import llama_cpp
import numpy as np


def main() -> None:
    """Prefill and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--no-repack", action="store_true")
    a = parser.parse_args()
    llama_cpp.llama_backend_init()
    of_model = llama_cpp.llama_model_default_params()
    of_model.n_gpu_layers, of_model.use_extra_bufts = 0, not a.no_repack
    model = llama_cpp.llama_model_load_from_file(a.gguf.encode(), of_model)
    if not model:
        raise SystemExit(f"llama.cpp could not load {a.gguf}")
    of_context = llama_cpp.llama_context_default_params()
    of_context.n_ctx = 2 * a.tokens
    of_context.n_batch = of_context.n_ubatch = a.tokens
    of_context.n_threads = of_context.n_threads_batch = a.threads
    context = llama_cpp.llama_init_from_model(model, of_context)
    ids = np.random.default_rng(1).integers(2, a.vocab, a.tokens)
    seconds = []
    for _ in range(1 + a.repetitions):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = (llama_cpp.llama_token * a.tokens)(*ids.tolist())
        batch = llama_cpp.llama_batch_get_one(tokens, a.tokens)  # logits of the last token alone
        start = time.perf_counter()
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama.cpp failed")
        llama_cpp.llama_synchronize(context)
        seconds.append(time.perf_counter() - start)
    rates = [a.tokens / value for value in seconds[1:]]
    print(
        json.dumps(
            {
                "tokens_per_second": round(sum(rates) / len(rates), 3),
                "all": rates,
                "first": a.tokens / seconds[0],
                "tokens": a.tokens,
                "threads": a.threads,
                "repack": not a.no_repack,
            }
        )
    )


if __name__ == "__main__":
    main()
