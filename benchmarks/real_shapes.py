"""pack, run and profile at the shapes that people run, each within a hard memory limit.

    python benchmarks/real_shapes.py WITH_MEMORY_LIMIT WORK [--limit 6GiB] [--qwen-layers 16]

WITH_MEMORY_LIMIT BYTES COMMAND runs a command under a limit that counts the page cache, from an
empty page cache, and says its peak. In WORK lie the random checkpoints of real_checkpoints.py, made
where they are missing. Measured: packing gpt-oss-20b's MXFP4 codes as they are beside copying its
files with fsync; decoding from the bundle, with the stall beside what the missed bytes take at the
disk's bandwidth; and a profile of Qwen3-30B-A3B's layers, per layer beside the seconds that one of
transformers' layers takes for as many tokens in float32. One JSON object.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from child_runs import MemoryLimit, Outcome, run_program
from disk_bandwidth import measure_disk
from machine import drop_page_caches
from real_checkpoints import write_checkpoint
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeRotaryEmbedding,
)

from moe_tool.budget.sizes import parse_bytes

_COPY_BYTES = 2**24
_TIMEOUT_S = 3600.0
_SEQUENCE = 512
"""Tokens of a sequence, as `profile` takes them"""
_PROFILE_FIGURES = (
    "seconds", "tokens", "bytes_read", "checkpoint_bytes", "peak_rss_bytes", "memory_budget_bytes",
)  # fmt: skip
_SPARE_BYTES = 2**28
"""What a budget leaves of the hard limit: page cache of libraries, and the shell"""


def copy_seconds(source: Path, target: Path) -> float:
    """Return the seconds of copying a checkpoint's weights to one file, on the disk at the end."""
    drop_page_caches()
    start = time.perf_counter()
    with target.open("wb") as out:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb") as file:
                while block := file.read(_COPY_BYTES):
                    out.write(block)
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def moe_tool(arguments: list[str | Path], limit: MemoryLimit) -> Outcome:
    """Run a command of moe-tool under the limit."""
    command = [sys.executable, "-m", "moe_tool", *arguments, "--json"]
    return run_program(command, environment=dict(os.environ), timeout_s=_TIMEOUT_S, limit=limit)


def measure_gpt_oss(work: Path, limit: MemoryLimit, tokens: int) -> dict[str, Any]:
    """Return the figures of packing and running gpt-oss-20b."""
    checkpoint, bundle = work / "gpt-oss-20b", work / "gpt-oss-20b.bundle"
    if not checkpoint.exists():
        write_checkpoint("gpt-oss-20b", checkpoint, layers=None, dtype="bf16")
    shutil.rmtree(bundle, ignore_errors=True)
    copied = copy_seconds(checkpoint, work / "copy")
    memory = str(limit.size_bytes - _SPARE_BYTES)
    packed = moe_tool(
        ["pack", checkpoint, "--bits", "native", "--out", bundle, "--profiles", work / "none"],
        limit,
    )
    row: dict[str, Any] = {"copy_seconds": copied, "pack": packed.fields or packed.failure}
    row["pack_peak_bytes"] = packed.peak_bytes
    if packed.failure is not None:
        return row
    run = ["run", bundle, "--prompt", "The list", "--max-tokens", str(tokens), "--ignore-eos"]
    ran = moe_tool([*run, "--memory", memory], limit)
    row |= {"run": ran.fields or ran.failure, "run_peak_bytes": ran.peak_bytes}
    row["disk_bytes_per_s"] = measure_disk(bundle, max_bytes=2 * 2**30).bytes_per_s
    return row


@torch.inference_mode()
def plain_layer_seconds(checkpoint: Path, tokens: int) -> float:
    """Return the seconds of one layer of transformers for so many tokens, in float32."""
    config = Qwen3MoeConfig.from_pretrained(checkpoint)
    layer = Qwen3MoeDecoderLayer(config, 0).float().eval()
    for parameter in layer.parameters():
        parameter.normal_(std=0.02)
    states = torch.randn(tokens // _SEQUENCE, _SEQUENCE, config.hidden_size)
    positions = torch.arange(_SEQUENCE)[None]
    rotary = Qwen3MoeRotaryEmbedding(config)(states, positions)
    start = time.perf_counter()
    for sequences in states.split(4):
        layer(sequences, position_embeddings=rotary, position_ids=positions)
    return time.perf_counter() - start


def measure_qwen(
    work: Path, limit: MemoryLimit, *, layers: int, dtype: str, tokens: int
) -> dict[str, Any]:
    """Return the figures of profiling layers of Qwen3-30B-A3B."""
    checkpoint = work / f"qwen3-30b-{layers}-{dtype}"
    if not checkpoint.exists():
        write_checkpoint("qwen3-30b", checkpoint, layers=layers, dtype=dtype)
    out = work / f"{checkpoint.name}.h5"
    profile = ["profile", checkpoint, "--data", "builtin", "--tokens", str(tokens), "--out", out]
    done = moe_tool([*profile, "--memory", str(limit.size_bytes - _SPARE_BYTES)], limit)
    return {
        "layers": layers,
        "dtype": dtype,
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "profile": done.failure or {name: done.fields[name] for name in _PROFILE_FIGURES},
        "seconds_per_layer": None if done.failure else done.fields["seconds"] / layers,
        "plain_seconds_per_layer": plain_layer_seconds(checkpoint, tokens),
        "profile_peak_bytes": done.peak_bytes,
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("with_memory_limit", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--limit", default="6GiB")
    parser.add_argument("--run-tokens", type=int, default=48)
    parser.add_argument("--profile-tokens", type=int, default=8192)
    parser.add_argument("--qwen-layers", type=int, default=16)
    parser.add_argument("--only", choices=("gpt-oss", "bf16", "fp8"))
    given = parser.parse_args()
    limit = MemoryLimit(program=given.with_memory_limit, size_bytes=parse_bytes(given.limit))
    rows: dict[str, Any] = {"limit_bytes": limit.size_bytes}
    if given.only in (None, "gpt-oss"):
        rows["gpt-oss-20b"] = measure_gpt_oss(given.work, limit, given.run_tokens)
    for dtype in ("bf16", "fp8"):
        if given.only in (None, dtype):
            rows[f"qwen3-30b-{dtype}"] = measure_qwen(
                given.work,
                limit,
                layers=given.qwen_layers,
                dtype=dtype,
                tokens=given.profile_tokens,
            )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
