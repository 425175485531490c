"""Sizes of a model's skeleton, so that planning needs no checkpoint."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_tool.artifacts.moe_shape import Count
from moe_tool.artifacts.schema import FrozenModel

_SizeBytes = Annotated[int, Field(ge=0, le=2**50)]
_MAX_CONFIG_CHARACTERS = 2**20
# Codes are stored in whole tiles: quantization/bit_packing.py.
_TILE_OUTPUTS = 16
_TILE_INPUTS = 32
_SCALE_BYTES = 2


class LinearCount(FrozenModel):
    """Number of matrices of one shape."""

    n_outputs: Count
    n_inputs: Count
    count: Count

    @property
    def n_weights(self) -> int:
        """Scalars in all matrices of the shape."""
        return self.count * self.n_outputs * self.n_inputs

    def stored_bytes(self, width_bits: int, group: int) -> int:
        """Return the bytes of all matrices as codes, with a float16 scale per group."""
        n_outputs = _up_to(self.n_outputs, _TILE_OUTPUTS)
        code_bytes = n_outputs * _up_to(self.n_inputs, _TILE_INPUTS) * width_bits // 8
        scale_bytes = n_outputs * -(-self.n_inputs // group) * _SCALE_BYTES
        return self.count * (code_bytes + scale_bytes)


class TablesOnDisk(FrozenModel):
    """Embedding tables that a run leaves on disk where memory has no room for everything."""

    held_bytes: Annotated[int, Field(ge=1, le=2**50)]
    """Bytes that they would take in memory"""
    reading_bytes: _SizeBytes
    """Most bytes that loading holds beside the rest of the skeleton"""


class SkeletonFacts(FrozenModel):
    """Sizes of one checkpoint's skeleton."""

    native_bytes: _SizeBytes
    """Bytes of all tensors but the routed experts', as stored in the checkpoint: of codes that a
    run holds as they are, and of float32 where it decodes them"""
    linear_native_bytes: _SizeBytes
    """Part of `native_bytes` that codes replace when matrices are quantized"""
    largest_tensor_bytes: _SizeBytes
    linears: Annotated[tuple[LinearCount, ...], Field(max_length=2**16)]
    """Matrices that may be quantized, by ascending shape"""
    tied_head_weights: _SizeBytes
    """Scalars of a head tied to the embedding, which gets codes while the embedding stays native"""
    held_bytes: _SizeBytes | None = None
    """Bytes in memory of a run that holds `native_bytes`: routers and norms are widened; None in
    profiles of earlier versions"""
    reading_bytes: _SizeBytes | None = None
    """Most bytes that loading holds beside them; None in profiles of earlier versions"""
    tables_on_disk: TablesOnDisk | None = None
    """Large embedding tables; None without any, and in profiles of earlier versions"""
    config_json: Annotated[str, Field(max_length=_MAX_CONFIG_CHARACTERS)]
    """config.json on one line, for models.model_config.config_from_json"""

    @model_validator(mode="after")
    def _consistent(self) -> "SkeletonFacts":
        if max(self.linear_native_bytes, self.largest_tensor_bytes) > self.native_bytes:
            raise ValueError("a part of the skeleton is larger than all of it")
        tables, held_bytes = self.tables_on_disk, self.held_bytes
        if tables is not None and (held_bytes is None or tables.held_bytes > held_bytes):
            raise ValueError("the embedding tables are larger than the skeleton")
        if self.tied_head_weights > sum(linear.n_weights for linear in self.linears):
            raise ValueError("the tied head is larger than all matrices")
        return self

    def stored_bytes(self, bits: Literal["native", "8", "4"], group: int = 64) -> int:
        """Return the bytes of the skeleton's tensors in a bundle of `pack --skeleton-bits`.

        Args:
            bits: bits of the matrices in `linears`; everything else keeps the checkpoint's dtype.
            group: adjacent inputs of a row that share a scale.
        """
        if bits == "native":
            return self.native_bytes
        codes = sum(linear.stored_bytes(int(bits), group) for linear in self.linears)
        return self.native_bytes - self.linear_native_bytes + codes


def _up_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
