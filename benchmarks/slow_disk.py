"""Windows of text decoded in several ways, taking turns, on a disk as slow as a layer is fast."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moe_tool.benchmarking.bench_plan import SpeedTest
from moe_tool.benchmarking.speed_run import Sample, run_test
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.runtime.session import Session
from moe_tool.store.throttle import Throttle


def time_windows(
    session: Session,
    ids: torch.Tensor,
    test: SpeedTest,
    *,
    n_windows: int,
    ways: Mapping[str, Callable[[], None]],
) -> dict[str, list[Sample]]:
    """Return the samples of every way, one per window; a first window warms up.

    Args:
        ids: [n] int64 token ids, of which windows are cut.
        ways: name -> what to do before a window to decode it in that way.
    """
    found: dict[str, list[Sample]] = {name: [] for name in ways}
    for number, window in enumerate(ids.split(test.positions)[: n_windows + 1]):
        for name, prepare in ways.items():
            prepare()
            sample = run_test(session, test, window, cache_state="warm")
            if number:
                found[name].append(sample)
    return found


def slow_disk(bundle: Path, token_s: float, *, miss_per_layer: float) -> Throttle:
    """Return the disk that reads an expert in `miss_per_layer` times the time of a layer, where
    `token_s` is the time of a token with everything in memory."""
    with BundleReader.open(bundle) as opened:
        layer_s = token_s / len(opened.manifest.shape.layers)
        record_bytes = opened.manifest.primaries[0].record_size_bytes
    print(f"everything in memory: {1 / token_s:.1f} tokens/s, {1e6 * layer_s:.0f} us a layer")
    return Throttle(bytes_per_s=record_bytes / (miss_per_layer * layer_s))
