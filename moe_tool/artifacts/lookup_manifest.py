"""Manifest of a lookup bundle: a model without experts, and a table with a row per token id."""

from typing import Annotated, Literal

from pydantic import Field

from moe_tool.artifacts.bundle_manifest import BundleFile, SkeletonTensor
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.row_tables import HashedBlocks
from moe_tool.artifacts.schema import FrozenModel

LOOKUP_KIND = "lookup-bundle"
RowForm = Literal["F32", "F16", "BF16", "int8", "nf4"]
"""Floats of the checkpoint by safetensors' name, or codes with a scale for each block"""

_Count = Annotated[int, Field(ge=1, lt=2**31)]


class LookupManifest(FrozenModel):
    """Content of manifest.json of a lookup bundle."""

    kind: Literal["lookup-bundle"] = "lookup-bundle"
    format_version: Literal[1] = 1
    tool_version: str
    identity: ModelIdentity
    """Model that the rows were computed from"""
    vocabulary: _Count
    """V, rows of the table"""
    layers: _Count
    """L"""
    experts: _Count
    """N, experts of each layer"""
    hidden: _Count
    """d"""
    form: RowForm
    row_bytes: _Count
    """Bytes of a row: what a new token reads"""
    skeleton: tuple[SkeletonTensor, ...]
    """Tensors of skeleton.safetensors with their hashes"""
    rows: HashedBlocks
    """Hashes of the blocks of the only tensor of rows.safetensors"""
    files: tuple[BundleFile, ...]
    """All other files of the folder"""

    @property
    def row_width(self) -> int:
        """Number of values in a row: L * N * d"""
        return self.layers * self.experts * self.hidden

    @property
    def table_bytes(self) -> int:
        """Size of the table on disk"""
        return self.vocabulary * self.row_bytes
