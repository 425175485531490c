"""Retrain the demo model: `python -m moe_tool.demo.train [--out DIR] [--quick]`."""

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from moe_tool.demo import demo_model_path
from moe_tool.demo.measure import DemoFigures, measure_demo_model, unmet_criteria
from moe_tool.demo.training import DENSE_STAGE, MIXTURE_STAGE, SEED, train_demo_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure and install the checkpoint; return 1 if it fails its criteria.

    The new folder is written beside the old one and replaces it only when complete.
    """
    parser = argparse.ArgumentParser(prog="python -m moe_tool.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: the demo model's folder")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, to try the script; needs --out"
    )
    parser.add_argument("--threads", type=int, default=1, help="the result depends on it")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick makes an untrained model: give --out too")
    out: Path = options.out or demo_model_path()
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    train_demo_model(
        unfinished,
        quick=options.quick,
        progress=lambda line: print(
            f"{time.monotonic() - started:7.1f} s  {line}", file=sys.stderr, flush=True
        ),
    )
    seconds = time.monotonic() - started
    figures = measure_demo_model(unfinished)
    if not options.quick:
        _write_record(unfinished, figures, seconds=seconds, threads=options.threads)
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out)

    weight_bytes = (out / "model.safetensors").stat().st_size
    print(f"wrote {out} ({weight_bytes} bytes of weights)")
    print(json.dumps(asdict(figures), indent=2))
    unmet = unmet_criteria(figures, weight_bytes=weight_bytes)
    for sentence in unmet:
        print(f"falls short: {sentence}", file=sys.stderr)
    return 1 if unmet else 0


def _write_record(folder: Path, figures: DemoFigures, *, seconds: float, threads: int) -> None:
    record = {
        "seed": SEED,
        "stages": [asdict(DENSE_STAGE), asdict(MIXTURE_STAGE)],
        "seconds": round(seconds),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "held_out": asdict(figures),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
