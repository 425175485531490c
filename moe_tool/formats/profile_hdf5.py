"""Profiles as HDF5: one small file per layer while recording, merged into one at the end.

Equal measurements give equal bytes: no times, no host names, objects in a fixed order.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from pydantic import ValidationError

from moe_tool.artifacts.expert_statistics import (
    ExpertStatistics,
    ProbeStatistics,
    RoutingCounts,
)
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.artifacts.skeleton_facts import SkeletonFacts
from moe_tool.errors import ArtifactVersionError, CorruptArtifactError
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.hostile_hdf5 import (
    child_dataset,
    child_group,
    created_hdf5,
    damaged,
    opened_hdf5,
    translated,
    verified_sha256,
)
from moe_tool.formats.json_artifact import first_complaint
from moe_tool.formats.profile_shapes import Expected, expected_datasets
from moe_tool.formats.strict_json import parse_json_object

PROFILE_VERSION = 1
_REMEDY = "record it again with moe-tool profile"
_TOKEN_DTYPES: dict[str, type[np.generic]] = {
    "ids": np.int32,
    "domain": np.int16,
    "document": np.int32,
    "held_out": np.bool_,
}
_TRACE_DTYPES: dict[str, type[np.generic]] = {
    "top_k_index": np.uint16,
    "top_k_weight": np.float16,
    "router_logits": np.float16,
    "selection_score": np.float16,
    "next_gate_index": np.uint16,
}
_GROUPS: dict[str, type[RoutingCounts] | type[ProbeStatistics]] = {
    "in_sample": RoutingCounts,
    "held_out": RoutingCounts,
    "probe": ProbeStatistics,
    "probe_held_out": ProbeStatistics,
}


class ProfileHeader(FrozenModel):
    """Inputs and settings of a profile, JSON in the root attribute `header`."""

    identity: ModelIdentity
    shape: MoeShape
    tokenizer_sha256: str
    sources: tuple[str, ...]
    seed: int
    seq_len: int
    holdout: float
    tool_version: str
    skeleton: SkeletonFacts | None = None
    """Sizes outside the experts; None in profiles of earlier versions"""


def write_layer_part(
    path: Path, layer: int, trace: LayerTrace, statistics: ExpertStatistics
) -> None:
    """Write one layer's measurements atomically."""
    with created_hdf5(path) as file:
        _write_layer(file.create_group(f"layers/{layer}"), trace, statistics)


def write_profile(
    path: Path,
    header: ProfileHeader,
    tokens: TracedTokens,
    parts: Mapping[int, Path],
    sensitivities: Mapping[int, float],
    *,
    sensitivity_n_tokens: int,
) -> None:
    """Merge the layers' parts into one profile atomically.

    Args:
        path: file to write.
        header: inputs and settings.
        tokens: the profiled tokens.
        parts: layer -> file written by `write_layer_part`.
        sensitivities: layer -> KL per squared relative error, known after the last layer.
        sensitivity_n_tokens: tokens that they were measured on.
    """
    with created_hdf5(path) as file:
        file.attrs["kind"] = "profile"
        file.attrs["format_version"] = PROFILE_VERSION
        file.attrs["header"] = header.model_dump_json()
        file.attrs["domains"] = json.dumps(tokens.domains)
        for name, dtype in _TOKEN_DTYPES.items():
            _put(file, f"tokens/{name}", np.asarray(getattr(tokens, name), dtype))
        for layer in sorted(parts):
            verified_sha256(parts[layer], remedy=_REMEDY)
            with opened_hdf5(parts[layer], remedy=_REMEDY) as part:
                part.copy(part[f"layers/{layer}"], file.require_group("layers"), name=str(layer))
            file[f"layers/{layer}/stats/sensitivity"][()] = sensitivities[layer]
            file[f"layers/{layer}/stats/sensitivity_n_tokens"][()] = sensitivity_n_tokens


class ProfileReader:
    """Open profile that reads layers on demand."""

    def __init__(self, path: Path, file: h5py.File, header: ProfileHeader, sha256: str) -> None:
        """Keep the open file; call `open` instead."""
        self.path = path
        self.header = header
        self.sha256 = sha256
        self._file = file
        self._domains: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> "ProfileReader":
        """Open a profile after checking its hash, version, header and every dataset's shape.

        Raises:
            NotFoundError: there is no such file.
            CorruptArtifactError: it is not a profile, truncated or damaged.
            ArtifactVersionError: it has another schema version.
            StorageError: it cannot be read.
        """
        sha256 = verified_sha256(path, remedy=_REMEDY)
        with translated(path, remedy=_REMEDY):
            file = h5py.File(path, "r", locking=False)
            try:
                reader = cls(path, file, _read_header(file, path), sha256)
                reader._check()
            except BaseException:
                file.close()
                raise
        return reader

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder-layer indices of the MoE layers."""
        return self.header.shape.layers

    @property
    def tokens(self) -> TracedTokens:
        """Profiled tokens.

        Raises:
            CorruptArtifactError: an id or a domain is out of range.
        """
        with translated(self.path, remedy=_REMEDY):
            ids, domain, document, held_out = (
                child_dataset(self._file, f"tokens/{name}", self.path)[()] for name in _TOKEN_DTYPES
            )
        self._require_below("tokens/ids", ids, self.header.shape.vocabulary)
        self._require_below("tokens/domain", domain, len(self._domains))
        self._require_below("tokens/document", document, 2**31)
        return TracedTokens(
            ids=ids,
            domain=domain,
            document=document,
            held_out=held_out.astype(bool),
            domains=self._domains,
        )

    def trace(self, layer: int) -> LayerTrace:
        """Return one layer's trace.

        Raises:
            CorruptArtifactError: an index names no expert, or a number is not finite.
        """
        with translated(self.path, remedy=_REMEDY):
            group = child_group(self._file, f"layers/{layer}", self.path)
            trace = _read_trace(group, self.path)
        for name in ("top_k_index", "next_gate_index"):
            where = f"layers/{layer}/{name}"
            self._require_below(where, getattr(trace, name), self.header.shape.experts)
        for name in ("top_k_weight", "router_logits"):
            if not np.isfinite(getattr(trace, name)).all():
                raise self._damaged(f"layers/{layer}/{name} holds NaN or infinity")
        # A score of -inf excludes a group.
        if trace.selection_score is not None and np.isnan(trace.selection_score).any():
            raise self._damaged(f"layers/{layer}/selection_score holds NaN")
        return trace

    def indices(self, layer: int, name: Literal["top_k_index", "next_gate_index"]) -> np.ndarray:
        """Return one array of a layer's trace without reading the others.

        Raises:
            CorruptArtifactError: an index names no expert.
        """
        where = f"layers/{layer}/{name}"
        with translated(self.path, remedy=_REMEDY):
            found: np.ndarray = child_dataset(self._file, where, self.path)[()]
        self._require_below(where, found, self.header.shape.experts)
        return found

    def router_logits(self, layer: int) -> np.ndarray:
        """Return one layer's router logits without the rest of its trace, [T, E] float16.

        Raises:
            CorruptArtifactError: a number is not finite.
        """
        return self._finite(f"layers/{layer}/router_logits")

    def gate_weights(self, layer: int) -> np.ndarray:
        """Return one layer's gate weights without the rest of its trace, [T, K] float16.

        Raises:
            CorruptArtifactError: a number is not finite.
        """
        return self._finite(f"layers/{layer}/top_k_weight")

    def statistics(self, layer: int) -> ExpertStatistics:
        """Return one layer's statistics.

        Raises:
            CorruptArtifactError: a number is not finite, or a count is negative.
        """
        with translated(self.path, remedy=_REMEDY):
            group = child_group(self._file, f"layers/{layer}", self.path)
            statistics = _read_statistics(group, self.path)
        for where, value in _numbers(statistics):
            if not np.isfinite(value).all():
                raise self._damaged(f"layers/{layer}/stats/{where} holds NaN or infinity")
            if value.dtype.kind == "i" and (value < 0).any():
                raise self._damaged(f"layers/{layer}/stats/{where} holds a count below zero")
        return statistics

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "ProfileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        """Check shapes and dtypes of all datasets, but no values."""
        header = self.header
        self._domains = _read_domains(self._file, self.path)
        ids = child_dataset(self._file, "tokens/ids", self.path)
        if len(ids.shape) != 2 or ids.shape[1] != header.seq_len:
            raise self._damaged(f"tokens/ids has shape {ids.shape}, wanted [N, {header.seq_len}]")
        for expected in expected_datasets(
            header.shape,
            n_sequences=ids.shape[0],
            seq_len=header.seq_len,
            n_domains=len(self._domains),
        ):
            self._require(expected)

    def _require(self, expected: Expected) -> None:
        group, _, name = expected.name.rpartition("/")
        if expected.is_optional and name not in child_group(self._file, group, self.path):
            return
        found = child_dataset(self._file, expected.name, self.path)
        dtype = found.dtype
        if found.shape != expected.shape or not expected.takes(dtype.kind, dtype.itemsize):
            raise self._damaged(
                f"{expected.name} has shape {found.shape} and dtype {quoted(dtype)}, "
                f"wanted {expected.shape} and {expected.dtype}"
            )

    def _finite(self, where: str) -> np.ndarray:
        with translated(self.path, remedy=_REMEDY):
            found: np.ndarray = child_dataset(self._file, where, self.path)[()]
        if not np.isfinite(found).all():
            raise self._damaged(f"{where} holds NaN or infinity")
        return found

    def _require_below(self, where: str, values: np.ndarray, limit: int) -> None:
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise self._damaged(f"{where} holds an index outside 0 to {limit - 1}")

    def _damaged(self, reason: str) -> CorruptArtifactError:
        return damaged(self.path, reason, remedy=_REMEDY)


def _read_header(file: h5py.File, path: Path) -> ProfileHeader:
    if file.attrs.get("kind") != "profile":
        raise CorruptArtifactError(f"{path} is not a profile of moe-tool", hint=_REMEDY)
    version = file.attrs.get("format_version")
    if not isinstance(version, np.integer) or version != PROFILE_VERSION:
        raise ArtifactVersionError(
            f"{path} has format version {quoted(version)}, wanted {PROFILE_VERSION}", hint=_REMEDY
        )
    text = file.attrs.get("header")
    if not isinstance(text, str):
        raise damaged(path, "it has no header", remedy=_REMEDY)
    parse_json_object(path, text.encode(), remedy=_REMEDY)  # stricter than pydantic
    try:
        return ProfileHeader.model_validate_json(text)
    except ValidationError as error:
        raise damaged(path, f"header: {first_complaint(error)}", remedy=_REMEDY) from error


def _read_domains(file: h5py.File, path: Path) -> tuple[str, ...]:
    text = file.attrs.get("domains")
    wrapped = b'{"domains": %s}' % (text.encode() if isinstance(text, str) else b"null")
    domains = parse_json_object(path, wrapped, remedy=_REMEDY)["domains"]
    if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
        raise damaged(path, "its domains are not a list of names", remedy=_REMEDY)
    return tuple(domains)


def _put(group: h5py.Group, name: str, value: Any) -> None:
    group.create_dataset(name, data=value, track_times=False)


def _write_layer(group: h5py.Group, trace: LayerTrace, statistics: ExpertStatistics) -> None:
    for name, dtype in _TRACE_DTYPES.items():
        value = getattr(trace, name)
        if value is not None:
            _put(group, name, np.asarray(value, dtype))
    for where, value in _numbers(statistics):
        _put(group, f"stats/{where}", value)


def _numbers(statistics: ExpertStatistics) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every array of the statistics with its path, in the order of the dataclasses."""
    for field in fields(ExpertStatistics):
        value = getattr(statistics, field.name)
        if field.name in _GROUPS:
            for inner in fields(_GROUPS[field.name]):
                yield f"{field.name}/{inner.name}", np.asarray(getattr(value, inner.name))
        else:
            yield field.name, np.asarray(value)


def _read_trace(group: h5py.Group, path: Path) -> LayerTrace:
    name = "selection_score"
    score = child_dataset(group, name, path) if name in group else None
    return LayerTrace(
        top_k_index=child_dataset(group, "top_k_index", path)[()],
        top_k_weight=child_dataset(group, "top_k_weight", path)[()],
        router_logits=child_dataset(group, "router_logits", path)[()],
        selection_score=score[()] if score is not None else None,
        next_gate_index=child_dataset(group, "next_gate_index", path)[()],
    )


def _read_statistics(group: h5py.Group, path: Path) -> ExpertStatistics:
    values: dict[str, Any] = {}
    for field in fields(ExpertStatistics):
        base = f"stats/{field.name}"
        if field.name in _GROUPS:
            kind = _GROUPS[field.name]
            values[field.name] = kind(
                **{f.name: _plain(group, f"{base}/{f.name}", path) for f in fields(kind)}
            )
        else:
            values[field.name] = _plain(group, base, path)
    return ExpertStatistics(**values)


def _plain(group: h5py.Group, name: str, path: Path) -> Any:
    """Return a dataset's array, or a scalar as a Python number."""
    value = child_dataset(group, name, path)[()]
    return value if np.ndim(value) else value.item()
