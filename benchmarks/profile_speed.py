"""How much of a plain forward's speed `profile` keeps, statistics included.

    python benchmarks/profile_speed.py MODEL --data wiki=wiki.txt [--tokens 65536] [--rounds 3]

Each round profiles the model, then pushes the same token sequences through transformers' own model
(float32, experts by the fastest implementation of a trial), the two interleaved in one process.
Both times start with an open checkpoint folder and end with the last token; imports and the text's
tokenization are in neither the plain forward's time nor, reported apart, in the profile's. Medians
and all rows are printed as JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel, locate_model
from moe_tool.profiling.recorder import record_profile
from moe_tool.text.sources import TextSource, parse_sources

_BATCH_TOKENS = 4096


def profile_once(
    model: LocatedModel, sources: tuple[TextSource, ...], tokens: int
) -> tuple[float, torch.Tensor]:
    """Return the seconds of one profile and the token sequences [N, S] that it used."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "profile.h5"
        start = time.perf_counter()
        record_profile(model, sources, out=out, tokens=tokens)
        seconds = time.perf_counter() - start
        with ProfileReader.open(out) as profile:
            return seconds, torch.from_numpy(profile.tokens.ids.astype("int64"))


@torch.no_grad()
def forward_once(folder: Path, ids: torch.Tensor, implementation: str) -> float:
    """Return the seconds of loading the model and pushing all sequences through it."""
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=implementation
    ).eval()
    for batch in ids.split(max(1, _BATCH_TOKENS // ids.shape[1])):
        model(input_ids=batch, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    """Run the rounds and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = locate_model(arguments.model)
    sources = parse_sources(arguments.data)
    _, ids = profile_once(model, sources, 4096)  # imports, page cache
    trial = {name: forward_once(model.folder, ids, name) for name in ("eager", "grouped_mm")}
    fastest = min(trial, key=lambda name: trial[name])
    rows = []
    for _ in range(arguments.rounds):
        profiled, ids = profile_once(model, sources, arguments.tokens)
        plain = forward_once(model.folder, ids, fastest)
        rows.append({"profile_s": profiled, "forward_s": plain, "ratio": plain / profiled})
    print(
        json.dumps(
            {
                "model": str(model.folder),
                "tokens": ids.numel(),
                "threads": torch.get_num_threads(),
                "experts_implementation": fastest,
                "median_ratio": statistics.median(row["ratio"] for row in rows),
                "profile_tokens_per_second": ids.numel()
                / statistics.median(r["profile_s"] for r in rows),
                "forward_tokens_per_second": ids.numel()
                / statistics.median(r["forward_s"] for r in rows),
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
