"""Quantized checkpoint that reads like a float32 one: each tensor is decoded when asked for."""

from collections.abc import Collection, Mapping

import torch

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.finite_numbers import are_finite, are_finite_codes
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import DTYPES, Checkpoint, TensorInfo
from moe_tool.models.stored_formats.stored_tensor import HINT, StoredTensor
from moe_tool.quantization.kept_codes import KeptWeight

_ITEM_BYTES = 4
Form = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Role, dtype and shape of each part; empty: not kept"""


class LogicalCheckpoint(Checkpoint):
    """Names, shapes and dtypes of the plain checkpoint over the tensors of a quantized one.

    `on_read` and `bytes_read` refer to the bytes on disk.
    """

    def __init__(
        self,
        raw: Checkpoint,
        stored: Mapping[str, StoredTensor],
        *,
        format_name: str,
        unused: Collection[str] = (),
        is_declared: bool = False,
    ) -> None:
        """Lay out the logical tensors; nothing is read.

        Args:
            raw: the checkpoint on disk, owned by this object from now on.
            stored: logical name -> how it is made; its parts' names must exist.
            format_name: name of the format, for people.
            unused: names on disk that the weights do not depend on.
            is_declared: whether files beside the checkpoint tell how it is stored, so that a copy
                of its tensors can be read by a copy of them.
        """
        hidden = {name for tensor in stored.values() for name in tensor.parts.values()}
        infos = {
            name: info
            for name, info in raw.tensors.items()
            if name not in hidden and name not in unused
        }
        for name, tensor in stored.items():
            first = raw.tensors[next(iter(tensor.parts.values()))]
            n_rows = tensor.shape[0] if tensor.is_stacked else 1
            infos[name] = TensorInfo(
                name=name,
                dtype="F32",
                shape=tensor.shape,
                file=first.file,
                offset=first.offset,
                size_bytes=_ITEM_BYTES * n_rows * tensor.n_weights,
            )
        super().__init__(infos)
        self.total_bytes = raw.total_bytes
        self.requires_finite, self.remarks = raw.requires_finite, raw.remarks
        self.format_name = format_name
        self.stored = stored
        """Logical name -> how it is made"""
        self._raw = raw
        self.is_declared = is_declared
        """Whether a copy of a skeleton holds its codes, see `copied`"""
        self.on_read = raw.on_read
        raw.on_read = self._count

    def read(self, name: str, *, row: int | None = None) -> torch.Tensor:
        """Return one tensor, or one slice of it along the first dimension, decoded.

        Raises:
            CorruptArtifactError: as the raw checkpoint, or a decoded weight is NaN or infinite.
            UnsupportedModelError, StorageError: as the raw checkpoint.
        """
        stored = self.stored.get(name)
        if stored is None:
            return self._raw.read(name, row=row)
        if not stored.is_stacked:
            whole = self._decode(name, stored, None)
            return whole if row is None else whole[row]
        if row is not None:
            return self._decode(name, stored, row)
        return torch.stack([self._decode(name, stored, k) for k in range(stored.shape[0])])

    def read_kept(self, name: str, *, row: int | None = None) -> KeptWeight | None:
        """Return one matrix in the codes on disk, [out, in]; None: it can only be decoded.

        Raises:
            CorruptArtifactError: as the raw checkpoint, or a weight is NaN or infinite.
            StorageError: as the raw checkpoint.
        """
        stored = self.stored.get(name)
        if stored is None or stored.keep is None:
            return None
        parts = self._parts(stored, row)
        if stored.require_kept is not None:
            stored.require_kept(parts)
        kept = stored.keep(parts)
        part = kept.broken_part() if self.requires_finite else None
        if part is not None:
            raise self._not_finite(name, row)
        return kept

    def outline(self, name: str) -> KeptWeight | None:
        """Return what `read_kept` returns of a whole matrix, with parts on the meta device.

        Nothing is read: headers tell the sizes.
        """
        stored = self.stored.get(name)
        if stored is None or stored.keep is None or stored.is_stacked or stored.row is not None:
            return None
        infos = {role: self._raw.tensors[part] for role, part in stored.parts.items()}
        with torch.device("meta"):
            try:
                return stored.keep(
                    {role: torch.empty(i.shape, dtype=DTYPES[i.dtype]) for role, i in infos.items()}
                )
            except (RuntimeError, ValueError):  # scales in another order than a kept weight's
                return None

    @property
    def raw(self) -> Checkpoint:
        """The tensors on disk"""
        return self._raw

    def places(self, name: str, *, row: int | None = None) -> dict[str, TensorInfo]:
        """Return the tensors on disk that `read` makes a tensor or a row of, by role."""
        stored = self.stored.get(name)
        if stored is None:
            return self._raw.places(name, row=row)
        row = row if stored.is_stacked else None
        return {role: self._raw.tensors[n].at_row(row) for role, n in stored.parts.items()}

    def form_of(self, name: str) -> Form:
        """Return dtype and shape of each part on disk: equal ones are kept in one way."""
        stored = self.stored.get(name)
        if stored is None or stored.keep is None:
            return ()
        parts = {role: self._raw.tensors[part] for role, part in stored.parts.items()}
        return tuple((role, info.dtype, info.shape) for role, info in sorted(parts.items()))

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of one tensor: float32 if it is decoded, else as on disk.

        Raises:
            CorruptArtifactError, UnsupportedModelError, StorageError: as `read`.
        """
        if name not in self.stored:
            return self._raw.read_bytes(name)
        return self.read(name).contiguous().numpy().tobytes()

    def copied(self, name: str) -> list[TensorInfo]:
        """Return the tensors on disk that a copy of a tensor needs."""
        stored = self.stored.get(name)
        if stored is None or not self.is_declared:
            return [self.tensors[name]]
        return [self._raw.tensors[part] for part in stored.parts.values()]

    def read_copied(self, name: str) -> bytes:
        """Return the bytes of a tensor that `copied` named.

        Raises:
            CorruptArtifactError: as `read_bytes`, or a code stands for NaN or infinity.
            StorageError: as the raw checkpoint.
        """
        if not self.is_declared:
            return self.read_bytes(name)
        data = self._raw.read_bytes(name)
        if self.requires_finite and not are_finite_codes(data, self._raw.tensors[name].dtype):
            raise self._not_finite(name, None)
        return data

    def extra_bytes(self, name: str) -> int:
        """Return the bytes that reading a tensor, or a row of a stacked one, holds beside it."""
        stored = self.stored.get(name)
        return 0 if stored is None else stored.decode_bytes - _ITEM_BYTES * stored.n_weights

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._raw.close()

    def _decode(self, name: str, stored: StoredTensor, row: int | None) -> torch.Tensor:
        made = stored.decode(self._parts(stored, row))
        if self.requires_finite and not are_finite(made):
            raise self._not_finite(name, row)
        return made

    def _parts(self, stored: StoredTensor, row: int | None) -> dict[str, torch.Tensor]:
        at = row if stored.row is None else stored.row
        return {role: self._raw.read(part, row=at) for role, part in stored.parts.items()}

    def _not_finite(self, name: str, row: int | None) -> CorruptArtifactError:
        where = "" if row is None else f" (row {row})"
        file = (self.tensors.get(name) or self._raw.tensors[name]).file
        return CorruptArtifactError(
            f"{file}: tensor {quoted(name)}{where} stands for NaN or infinity",
            hint=HINT,
        )

    def _count(self, name: str, row: int | None, view: memoryview) -> None:
        self.bytes_read += len(view)
        if self.on_read is not None:
            self.on_read(name, row, view)
