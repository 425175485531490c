"""Profiles as HDF5: one small file per layer while recording, merged into one at the end.

Equal measurements give equal bytes: no times, no host names, objects in a fixed order.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from moe_tool.artifacts.expert_statistics import (
    ExpertStatistics,
    ProbeStatistics,
    RoutingCounts,
)
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import KeptPrecision
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.artifacts.skeleton_facts import SkeletonFacts
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.given_kind import Given
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.hostile_hdf5 import (
    child_dataset,
    child_group,
    created_hdf5,
    damaged,
    opened_hdf5,
    read_header,
    translated,
    verified_sha256,
    write_header,
)
from moe_tool.formats.profile_shapes import Expected, expected_datasets
from moe_tool.formats.strict_json import parse_json_object
from moe_tool.formats.wrong_kind import require_kind, wrong_kind

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
    kept: KeptPrecision | None = None
    """Precision of the checkpoint's own codes, which native stands for; None: floats"""


def write_layer_part(
    path: Path, layer: int, trace: LayerTrace, statistics: ExpertStatistics
) -> None:
    """Write one layer's measurements atomically."""
    with created_hdf5(path) as file:
        _write_layer(file, layer, trace, statistics)


def _write_layer(
    file: h5py.File, layer: int, trace: LayerTrace, statistics: ExpertStatistics
) -> None:
    arrays = {
        name: np.asarray(getattr(trace, name), dtype)
        for name, dtype in _TRACE_DTYPES.items()
        if getattr(trace, name) is not None
    }
    group = file.create_group(f"layers/{layer}")
    for name, value in (*arrays.items(), *_numbers(statistics, "stats")):
        group.create_dataset(name, data=value, track_times=False)


def _write_tokens(file: h5py.File, header: ProfileHeader, tokens: TracedTokens) -> None:
    write_header(file, "profile", header)
    file.attrs["domains"] = json.dumps(tokens.domains)
    for name, dtype in _TOKEN_DTYPES.items():
        values = np.asarray(getattr(tokens, name), dtype)
        file.create_dataset(f"tokens/{name}", data=values, track_times=False)


def write_measured_profile(
    path: Path,
    header: ProfileHeader,
    tokens: TracedTokens,
    layers: Iterable[tuple[int, LayerTrace, ExpertStatistics]],
) -> None:
    """Write a profile from finished layers atomically; `layers` may produce one at a time."""
    with created_hdf5(path) as file:
        _write_tokens(file, header, tokens)
        for layer, trace, statistics in layers:
            _write_layer(file, layer, trace, statistics)


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
        parts: layer -> file written by `write_layer_part`.
        sensitivities: layer -> KL per squared relative error, known after the last layer.
        sensitivity_n_tokens: tokens that they were measured on.
    """
    with created_hdf5(path) as file:
        _write_tokens(file, header, tokens)
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
        require_kind(path, "profile")
        sha256 = verified_sha256(path, remedy=_REMEDY)
        with translated(path, remedy=_REMEDY):
            file = h5py.File(path, "r", locking=False)
            try:
                if file.attrs.get("kind") == "run-trace":
                    raise wrong_kind(path, Given(kind="run-trace"), "profile")
                label = "a profile of moe-tool"
                header = read_header(
                    file, path, "profile", ProfileHeader, label=label, remedy=_REMEDY
                )
                reader = cls(path, file, header, sha256)
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
        return TracedTokens(
            ids=self._below("tokens/ids", self.header.shape.vocabulary),
            domain=self._below("tokens/domain", len(self._domains)),
            document=self._below("tokens/document", 2**31),
            held_out=self._read("tokens/held_out").astype(bool),
            domains=self._domains,
        )

    def trace(self, layer: int) -> LayerTrace:
        """Return one layer's trace.

        Raises:
            CorruptArtifactError: an index names no expert, or a number is not finite.
        """
        score = None
        with translated(self.path, remedy=_REMEDY):
            group = child_group(self._file, f"layers/{layer}", self.path)
            if "selection_score" in group:
                score = child_dataset(group, "selection_score", self.path)[()]
        if score is not None and np.isnan(score).any():  # a score of -inf excludes a group
            raise self._damaged(f"layers/{layer}/selection_score holds NaN")
        return LayerTrace(
            top_k_index=self.indices(layer, "top_k_index"),
            top_k_weight=self.gate_weights(layer),
            router_logits=self.router_logits(layer),
            selection_score=score,
            next_gate_index=self.indices(layer, "next_gate_index"),
        )

    def indices(self, layer: int, name: Literal["top_k_index", "next_gate_index"]) -> np.ndarray:
        """Return one array of a layer's trace without reading the others.

        Raises:
            CorruptArtifactError: an index names no expert.
        """
        return self._below(f"layers/{layer}/{name}", self.header.shape.experts)

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
        for where, value in _numbers(statistics, f"layers/{layer}/stats"):
            if not np.isfinite(value).all():
                raise self._damaged(f"{where} holds NaN or infinity")
            if value.dtype.kind == "i" and (value < 0).any():
                raise self._damaged(f"{where} holds a count below zero")
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
        kinds = (found.dtype.kind, f"{found.dtype.kind}{found.dtype.itemsize}")
        if found.shape != expected.shape or expected.dtype not in kinds:
            raise self._damaged(
                f"{expected.name} has shape {found.shape} and dtype {quoted(found.dtype)}, "
                f"wanted {expected.shape} and {expected.dtype}"
            )

    def _read(self, where: str) -> np.ndarray:
        with translated(self.path, remedy=_REMEDY):
            found: np.ndarray = child_dataset(self._file, where, self.path)[()]
        return found

    def _finite(self, where: str) -> np.ndarray:
        found = self._read(where)
        if not np.isfinite(found).all():
            raise self._damaged(f"{where} holds NaN or infinity")
        return found

    def _below(self, where: str, limit: int) -> np.ndarray:
        found = self._read(where)
        if found.size and not 0 <= int(found.min()) <= int(found.max()) < limit:
            raise self._damaged(f"{where} holds an index outside 0 to {limit - 1}")
        return found

    def _damaged(self, reason: str) -> CorruptArtifactError:
        return damaged(self.path, reason, remedy=_REMEDY)


def _read_domains(file: h5py.File, path: Path) -> tuple[str, ...]:
    text = file.attrs.get("domains")
    wrapped = b'{"domains": %s}' % (text.encode() if isinstance(text, str) else b"null")
    domains = parse_json_object(path, wrapped, remedy=_REMEDY)["domains"]
    if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
        raise damaged(path, "its domains are not a list of names", remedy=_REMEDY)
    return tuple(domains)


def _numbers(statistics: Any, base: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every array of the statistics with its path, in the order of the dataclasses."""
    for field in fields(statistics):
        value, where = getattr(statistics, field.name), f"{base}/{field.name}"
        if field.name in _GROUPS:
            yield from _numbers(value, where)
        else:
            yield where, np.asarray(value)


def _read_statistics(group: h5py.Group, path: Path) -> ExpertStatistics:
    def read(kind: type[Any], base: str) -> Any:
        values = {}
        for field in fields(kind):
            where = f"{base}/{field.name}"
            if field.name in _GROUPS:
                values[field.name] = read(_GROUPS[field.name], where)
            else:
                value = child_dataset(group, where, path)[()]
                values[field.name] = value if np.ndim(value) else value.item()
        return kind(**values)

    found: ExpertStatistics = read(ExpertStatistics, "stats")
    return found
