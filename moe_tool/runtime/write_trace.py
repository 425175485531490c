"""Writer of a session's recorded calls as a trace file, for `simulate`."""

from pathlib import Path

import torch

from moe_tool import __version__
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.artifacts.run_trace import RunTraceHeader
from moe_tool.formats.run_trace_hdf5 import write_run_trace
from moe_tool.models.bundle_skeleton import matrix_bytes
from moe_tool.models.stored_modules import StoredLinear
from moe_tool.runtime.session import Session


def write_trace(session: Session, path: Path, *, decode_seconds: float) -> None:
    """Write the calls of a session with `record_trace` since it was opened; counts are those of
    its last run. Nothing but runs may have changed the session's cache."""
    assert session.runner.recorder is not None, "the session records no trace"
    store, manifest = session.runner.store, session.manifest
    prompt, decode = session.runner.stats.prompt, session.runner.stats.decode
    pinned = [
        (layer, int(expert))
        for layer in manifest.shape.layers
        for expert in store.pinned_mask(layer)[PRIMARY].nonzero()[0]
    ]
    (table,) = manifest.primaries  # `plan_run` refuses several tables and channels
    precision = table.precision
    assert precision.kind != "channels" and precision.kind != "low-rank"
    header = RunTraceHeader(
        identity=manifest.identity,
        shape=manifest.shape,
        precision=precision,
        record_size_bytes=table.record_size_bytes,
        skeleton_precision=manifest.skeleton_precision,
        matrix_bytes=matrix_bytes(session.bundle),
        n_matrices=_n_matrices(session),
        threads=session.plan.threads.n_threads,
        n_slots=session.plan.memory.n_slots,
        pinned=tuple(pinned),
        eviction=session.plan.eviction.name,
        prefetch=session.plan.prefetch,
        n_calls_before=session.runner.recorder.n_calls_before,
        prompt_tokens=prompt.tokens,
        decode_tokens=decode.tokens,
        decode_seconds=decode_seconds,
        hits=decode.hits,
        misses=decode.misses,
        prefetches=decode.prefetches,
        prefetch_hits=decode.prefetch_hits,
        prompt_hits=prompt.hits,
        prompt_misses=prompt.misses,
        stall_seconds=decode.stall_seconds,
        tool_version=__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_run_trace(path, header, session.runner.recorder.recorded())


def _n_matrices(session: Session) -> int:
    stored = (StoredLinear, torch.nn.Linear)
    return sum(isinstance(module, stored) for module in session.model.modules())
