"""Profiles as HDF5: one small file per layer while recording, merged into one that is read as hostile input.

The same measurements give the same bytes: no times, no host names, objects in a fixed order.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moe_tool.artifacts.expert_statistics import (
    PRICED_WIDTHS,
    ExpertStatistics,
    ProbeStatistics,
    RoutingCounts,
)
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.errors import (
    ArtifactVersionError,
    CorruptArtifactError,
    MoeToolError,
    NotFoundError,
    StorageError,
)
from moe_tool.formats.atomic_write import atomic_file

PROFILE_VERSION = 1
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HASH_BLOCK_BYTES = 16 * 2**20
_MAX_HEADER_CHARACTERS = 2**20
_REMEDY = "record it again with moe-tool profile"
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
    """What a profile was recorded from, in the root attribute `header` as JSON."""

    identity: ModelIdentity
    shape: MoeShape
    tokenizer_sha256: str
    sources: tuple[str, ...]
    seed: int
    seq_len: int
    holdout: float
    tool_version: str


def write_layer_part(
    path: Path, layer: int, trace: LayerTrace, statistics: ExpertStatistics
) -> None:
    """Write one layer's measurements, whole or not at all."""
    with _created(path) as file:
        _write_layer(file.create_group(f"layers/{layer}"), trace, statistics)


def read_layer_part(path: Path, layer: int) -> tuple[LayerTrace, ExpertStatistics]:
    """Return what `write_layer_part` was given."""
    with _opened(path) as file:
        group = _group(file, f"layers/{layer}", path)
        return _read_trace(group, path), _read_statistics(group, path)


def write_profile(
    path: Path,
    header: ProfileHeader,
    tokens: TracedTokens,
    parts: Mapping[int, Path],
    sensitivities: Mapping[int, float],
    *,
    sensitivity_n_tokens: int,
) -> None:
    """Merge the layers' parts into one profile, whole or not at all.

    Args:
        path: of the profile.
        header: what it was recorded from.
        tokens: its tokens.
        parts: layer -> file written by `write_layer_part`.
        sensitivities: layer -> KL per unit of squared relative error, known only once the last layer is through.
        sensitivity_n_tokens: tokens behind them.
    """
    with _created(path) as file:
        file.attrs["kind"] = "profile"
        file.attrs["format_version"] = PROFILE_VERSION
        file.attrs["header"] = header.model_dump_json()
        file.attrs["domains"] = json.dumps(tokens.domains)
        for name in ("ids", "domain", "document", "held_out"):
            _put(file, f"tokens/{name}", getattr(tokens, name))
        for layer in sorted(parts):
            with _opened(parts[layer]) as part:
                part.copy(part[f"layers/{layer}"], file.require_group("layers"), name=str(layer))
            file[f"layers/{layer}/stats/sensitivity"][()] = sensitivities[layer]
            file[f"layers/{layer}/stats/sensitivity_n_tokens"][()] = sensitivity_n_tokens


class ProfileReader:
    """An open profile; layers are read when asked for."""

    def __init__(self, path: Path, file: h5py.File, header: ProfileHeader, sha256: str) -> None:
        """Use `open`."""
        self.path = path
        self.header = header
        self.sha256 = sha256
        self._file = file

    @classmethod
    def open(cls, path: Path) -> "ProfileReader":
        """Open a profile after checking its version, header and the shape of every dataset.

        Raises:
            NotFoundError: there is no such file.
            CorruptArtifactError: it is not a profile, truncated or damaged.
            ArtifactVersionError: it has another schema version.
            StorageError: it cannot be read.
        """
        _require_hdf5(path)
        sha256 = _file_sha256(path)
        with _translated(path):
            file = h5py.File(path, "r")
            try:
                header = _read_header(file, path)
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
        """The profile's tokens."""
        with _translated(self.path):
            group = self._file["tokens"]
            return TracedTokens(
                ids=group["ids"][()],
                domain=group["domain"][()],
                document=group["document"][()],
                held_out=group["held_out"][()].astype(bool),
                domains=tuple(json.loads(self._file.attrs["domains"])),
            )

    def trace(self, layer: int) -> LayerTrace:
        """Return one layer's routing.

        Raises:
            CorruptArtifactError: an index names no expert, or a number is not finite.
        """
        with _translated(self.path):
            trace = _read_trace(_group(self._file, f"layers/{layer}", self.path), self.path)
        n_experts = self.header.shape.experts
        for name in ("top_k_index", "next_gate_index"):
            if getattr(trace, name).size and getattr(trace, name).max() >= n_experts:
                raise _damaged(self.path, f"layers/{layer}/{name} names an expert beyond {n_experts - 1}")
        for name in ("top_k_weight", "router_logits"):
            if not np.isfinite(getattr(trace, name)).all():
                raise _damaged(self.path, f"layers/{layer}/{name} holds NaN or infinity")
        return trace

    def statistics(self, layer: int) -> ExpertStatistics:
        """Return one layer's statistics.

        Raises:
            CorruptArtifactError: a number is not finite.
        """
        with _translated(self.path):
            group = _group(self._file, f"layers/{layer}", self.path)
            statistics = _read_statistics(group, self.path)
        for where, value in _numbers(statistics):
            if not np.isfinite(value).all():
                raise _damaged(self.path, f"layers/{layer}/stats/{where} holds NaN or infinity")
        return statistics

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "ProfileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        """Shapes and dtypes of everything, no value yet."""
        file, path, shape = self._file, self.path, self.header.shape
        domains = json.loads(file.attrs["domains"])
        if not isinstance(domains, list) or not all(isinstance(d, str) for d in domains):
            raise _damaged(path, "its domains are not a list of names")
        ids = _dataset(file, "tokens/ids", path)
        if ids.ndim != 2 or ids.shape[1] != self.header.seq_len:
            raise _damaged(path, f"tokens/ids has shape {ids.shape}")
        n_sequences, n_tokens = ids.shape[0], ids.size
        self._require("tokens/ids", ids.shape, "i")
        self._require("tokens/domain", (n_sequences,), "i")
        self._require("tokens/document", ids.shape, "i")
        self._require("tokens/held_out", (n_sequences,), "b")
        for position, layer in enumerate(shape.layers):
            depth = min(3, len(shape.layers) - 1 - position)
            base = f"layers/{layer}/"
            self._require(base + "top_k_index", (n_tokens, shape.top_k), "u")
            self._require(base + "top_k_weight", (n_tokens, shape.top_k), "f")
            self._require(base + "router_logits", (n_tokens, shape.experts), "f")
            if base + "selection_score" in file:
                self._require(base + "selection_score", (n_tokens, shape.experts), "f")
            self._require(base + "next_gate_index", (depth, n_tokens, shape.top_k), "u")
            self._check_statistics(base + "stats/", len(domains))

    def _check_statistics(self, base: str, n_domains: int) -> None:
        e = self.header.shape.experts
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "eps_buddy_transferred": ((e, e), "f"),
            "eps_bits": ((e, len(PRICED_WIDTHS)), "f"),
            "eps_bits_n_tokens": ((e,), "i"),
            "router_similarity": ((e, e), "f"),
            "sensitivity": ((), "f"),
            "sensitivity_n_tokens": ((), "i"),
        }
        for part in ("in_sample", "held_out"):
            shapes |= {
                f"{part}/n_tokens": ((), "i"),
                f"{part}/load": ((e,), "i"),
                f"{part}/gate_sum": ((e,), "f"),
                f"{part}/coactivation": ((e, e), "i"),
                f"{part}/domain_load": ((n_domains, e), "i"),
                f"{part}/same_as_previous": ((), "f"),
            }
        vectors = {"n_routed": "i", "fell_back": "b", "output_norm": "f", "output_ratio": "f"}
        for part in ("probe", "probe_held_out"):
            for field in fields(ProbeStatistics):
                if field.type in (int, "int"):
                    shapes[f"{part}/{field.name}"] = ((), "i")
                elif field.name in vectors or field.name == "eps_drop":
                    shapes[f"{part}/{field.name}"] = ((e,), vectors.get(field.name, "f"))
                else:
                    shapes[f"{part}/{field.name}"] = ((e, e), "f")
        for name, (shape, kind) in shapes.items():
            self._require(base + name, shape, kind)

    def _require(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        found = _dataset(self._file, name, self.path)
        if found.shape != shape or found.dtype.kind != kind:
            raise _damaged(
                self.path,
                f"{name} has shape {found.shape} and dtype {found.dtype}, wanted {shape} of kind {kind!r}",
            )


@contextmanager
def _created(path: Path) -> Iterator[h5py.File]:
    with atomic_file(path) as raw:
        # Through a Python file object: HDF5 then leaves no lock and no name of its own.
        with h5py.File(raw, "w", libver=("v110", "v110"), track_order=False) as file:
            yield file


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    _require_hdf5(path)
    with _translated(path), h5py.File(path, "r") as file:
        yield file


def _require_hdf5(path: Path) -> None:
    if not path.exists():
        raise NotFoundError(f"{path} does not exist", hint=_REMEDY)
    if not path.is_file():
        raise CorruptArtifactError(f"{path} is not a file", hint=_REMEDY)
    try:
        with open(path, "rb") as file:
            start = file.read(len(_SIGNATURE))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", hint="check the disk") from error
    if start != _SIGNATURE:
        raise CorruptArtifactError(f"{path} is not an HDF5 file, so not a profile", hint=_REMEDY)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """h5py raises whatever comes to its mind on a damaged file."""
    try:
        yield
    except MoeToolError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        raise _damaged(path, f"HDF5 says {lines[0][:200] if lines else type(error).__name__}") from error


def _damaged(path: Path, reason: str) -> CorruptArtifactError:
    return CorruptArtifactError(f"{path} is damaged: {reason}", hint=_REMEDY)


def _read_header(file: h5py.File, path: Path) -> ProfileHeader:
    kind = file.attrs.get("kind")
    if kind != "profile":
        raise CorruptArtifactError(f"{path} is not a profile of moe-tool", hint=_REMEDY)
    version = file.attrs.get("format_version")
    if version is None or np.ndim(version) or int(version) != PROFILE_VERSION:
        raise ArtifactVersionError(
            f"{path} has format version {str(version)[:40]}, wanted {PROFILE_VERSION}", hint=_REMEDY
        )
    text = file.attrs.get("header")
    if not isinstance(text, str) or len(text) > _MAX_HEADER_CHARACTERS:
        raise _damaged(path, "it has no header")
    return ProfileHeader.model_validate_json(text)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", hint="check the disk") from error
    return digest.hexdigest()


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
    """Every number of the statistics with its path, in the order of the dataclasses."""
    for field in fields(ExpertStatistics):
        value = getattr(statistics, field.name)
        if field.name in _GROUPS:
            for inner in fields(_GROUPS[field.name]):
                yield f"{field.name}/{inner.name}", np.asarray(getattr(value, inner.name))
        else:
            yield field.name, np.asarray(value)


def _group(file: h5py.Group, name: str, path: Path) -> h5py.Group:
    link = file.get(name, getlink=True) if name in file else None
    if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Group):
        raise _damaged(path, f"{name} is missing")
    return file[name]


def _dataset(file: h5py.Group, name: str, path: Path) -> h5py.Dataset:
    """A dataset stored in this very file, as it lies: no links out, no filters, no sparse storage."""
    link = file.get(name, getlink=True) if name in file else None
    if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise _damaged(path, f"{name} is missing")
    found = file[name]
    stored = found.id.get_storage_size()
    if found.external or found.is_virtual or found.chunks or stored != found.size * found.dtype.itemsize:
        raise _damaged(path, f"{name} is not stored plainly in the file")
    return found


def _read_trace(group: h5py.Group, path: Path) -> LayerTrace:
    return LayerTrace(
        top_k_index=_dataset(group, "top_k_index", path)[()],
        top_k_weight=_dataset(group, "top_k_weight", path)[()],
        router_logits=_dataset(group, "router_logits", path)[()],
        selection_score=_dataset(group, "selection_score", path)[()]
        if "selection_score" in group
        else None,
        next_gate_index=_dataset(group, "next_gate_index", path)[()],
    )


def _read_statistics(group: h5py.Group, path: Path) -> ExpertStatistics:
    values: dict[str, Any] = {}
    for field in fields(ExpertStatistics):
        base = f"stats/{field.name}"
        if field.name in _GROUPS:
            kind = _GROUPS[field.name]
            inner = {f.name: _plain(_dataset(group, f"{base}/{f.name}", path)) for f in fields(kind)}
            values[field.name] = kind(**inner)
        else:
            values[field.name] = _plain(_dataset(group, base, path))
    return ExpertStatistics(**values)


def _plain(dataset: h5py.Dataset) -> Any:
    value = dataset[()]
    return value.item() if dataset.shape == () else value
