"""HDF5 files of run traces."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_tool.artifacts.run_trace import RecordedCalls, RunTraceHeader
from moe_tool.formats.hostile_hdf5 import (
    child_dataset,
    created_hdf5,
    damaged,
    opened_hdf5,
    read_header,
    translated,
    verified_sha256,
    write_header,
)
from moe_tool.formats.policy_names import named_eviction
from moe_tool.formats.record_form import record_form
from moe_tool.formats.wrong_kind import require_kind
from moe_tool.policies.eviction import EvictionChoice

_REMEDY = "record it again with moe-tool profile or run --record-trace"
_MAX_UNSCORED_EXPERTS = 2**16
"""Most experts of all layers in a file without scores, whose size would prove the number: twice
those of the largest models"""
_DTYPES: dict[str, type[np.generic]] = {
    "layer": np.int32,
    "is_decode": np.bool_,
    "start": np.int64,
    "keys": np.int32,
    "guess_start": np.int64,
    "guesses": np.int32,
    "scores": np.uint16,
}


def write_run_trace(path: Path, header: RunTraceHeader, calls: RecordedCalls) -> None:
    """Write a trace atomically."""
    with created_hdf5(path) as file:
        write_header(file, "run-trace", header)
        for name, dtype in _DTYPES.items():
            values = getattr(calls, name)
            if values is not None:
                file.create_dataset(name, data=np.asarray(values, dtype), track_times=False)


def is_run_trace(path: Path) -> bool:
    """Return whether an HDF5 file is the trace of a run.

    Raises:
        NotFoundError, CorruptArtifactError, StorageError: it is no intact HDF5 file.
    """
    require_kind(path, "profile")
    verified_sha256(path, remedy=_REMEDY)
    with opened_hdf5(path, remedy=_REMEDY) as file, translated(path, remedy=_REMEDY):
        return bool(file.attrs.get("kind") == "run-trace")


def read_run_trace(path: Path) -> tuple[RunTraceHeader, RecordedCalls]:
    """Return a trace after checking that its arrays are consistent.

    Raises:
        NotFoundError: there is no such file.
        CorruptArtifactError: it is no trace of a run, truncated or damaged.
        ArtifactVersionError: it has another version.
        StorageError: it cannot be read.
    """
    verified_sha256(path, remedy=_REMEDY)
    with opened_hdf5(path, remedy=_REMEDY) as file, translated(path, remedy=_REMEDY):
        label = "the trace of a run"
        header = read_header(file, path, "run-trace", RunTraceHeader, label=label, remedy=_REMEDY)
        choice = named_eviction(path, header.eviction, remedy=_REMEDY)
        n_scores = child_dataset(file, "scores", path).size if "scores" in file else 0
        complaint = _size_complaint(header, choice, n_scores)
        if complaint is not None:
            raise damaged(path, complaint, remedy=_REMEDY)
        arrays: dict[str, Any] = {}
        for name, dtype in _DTYPES.items():
            if name == "scores" and name not in file:
                arrays[name] = None
                continue
            values = child_dataset(file, name, path)[()]
            if values.dtype != dtype:
                raise damaged(path, f"{name} holds {values.dtype}", remedy=_REMEDY)
            arrays[name] = values
    calls = RecordedCalls(**arrays)
    complaint = _complaint(header, calls)
    if complaint is not None:
        raise damaged(path, complaint, remedy=_REMEDY)
    return header, calls


def _complaint(header: RunTraceHeader, calls: RecordedCalls) -> str | None:
    """Return the first inconsistency of the arrays, None without one."""
    n_calls, n_layers, n_experts = len(calls.layer), len(header.shape.layers), header.shape.experts
    n_keys = n_layers * n_experts
    if calls.layer.ndim != 1 or calls.is_decode.shape != (n_calls,):
        return "its calls have no layer or no phase"
    if not _is_within(calls.layer, n_layers):
        return "a layer does not exist"
    for start, keys in ((calls.start, calls.keys), (calls.guess_start, calls.guesses)):
        if start.shape != (n_calls + 1,) or keys.ndim != 1:
            return "a list of experts has no beginnings"
        if start[0] != 0 or start[-1] != len(keys) or (np.diff(start) < 0).any():
            return "its lists of experts do not add up"
        if not _is_within(keys, n_keys):
            return "an expert does not exist"
    owner = np.repeat(calls.layer, np.diff(calls.start))
    if (calls.keys // n_experts != owner).any():
        return "a call names an expert of another layer"
    first = np.zeros(len(calls.keys), bool)
    first[calls.start[:-1][np.diff(calls.start) > 0]] = True
    if (np.diff(calls.keys, prepend=-1)[~first] <= 0).any():
        return "a call names an expert twice"
    guesser = np.repeat(calls.layer, np.diff(calls.guess_start))
    if (calls.guesses // n_experts <= guesser).any():
        return "a guess is not about a later layer"
    if calls.scores is not None and calls.scores.shape != (n_calls, n_experts):
        return "its scores have another shape"
    if header.n_calls_before > n_calls:
        return "it counts more calls than it has"
    return None


def _size_complaint(header: RunTraceHeader, choice: EvictionChoice, n_scores: int) -> str | None:
    """Return an inconsistency of numbers that decide sizes in memory, None without one."""
    shape = header.shape
    n_experts = len(shape.layers) * shape.experts
    if n_experts > max(_MAX_UNSCORED_EXPERTS, n_scores):
        return f"it is too small for a run of {n_experts} experts"
    n_left, n_layers = header.n_slots - len(header.pinned), len(shape.layers)
    if choice.per_layer and 0 < n_left < n_layers:
        return f"{n_left} slots are fewer than one for each of {n_layers} layers"
    layout = record_form(shape, header.precision).layout
    if layout.size_bytes != header.record_size_bytes:
        return f"a record has {header.record_size_bytes} bytes, its shape makes {layout.size_bytes}"
    return None


def _is_within(values: np.ndarray, limit: int) -> bool:
    return not len(values) or 0 <= int(values.min()) <= int(values.max()) < limit
