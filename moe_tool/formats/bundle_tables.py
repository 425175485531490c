"""Embedding tables of an open bundle: opened for reads by row, or checked block by block."""

from collections.abc import Iterator, Mapping, Sequence

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.formats.block_hashes import CheckedBlocks
from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.formats.table_rows import Pace, TableRows, full_speed
from moe_tool.formats.tensor_stream import stream_hashed


class BundleTables:
    """Tables of the skeleton that stay on disk; closed with the bundle."""

    def __init__(self, manifest: BundleManifest, skeleton: Mapping[str, TensorInfo]) -> None:
        """Keep the hashes; nothing is read."""
        self._hashes = {tensor.name: tensor.xxh3 for tensor in manifest.skeleton}
        self._skeleton = skeleton
        found = manifest.row_tables
        self._parts = {} if found is None else {part.tensor: part for part in found.parts}
        self._rows: list[TableRows] = []
        self.pace: Pace = full_speed
        """Pace of the reads of tables that are opened from now on"""

    @property
    def bytes_read(self) -> int:
        """Bytes of rows read, without what was read along to check them"""
        return sum(rows.bytes_read for rows in self._rows)

    def open(self, parts: Sequence[TensorInfo]) -> TableRows:
        """Open a table; see `TableRows.open`."""
        self._rows.append(TableRows.open(parts, self._hashes, self._blocks()))
        self._rows[-1].pace = self.pace
        return self._rows[-1]

    def stream(self, name: str) -> Iterator[memoryview]:
        """Yield any tensor of the skeleton in pieces; see `stream_hashed`."""
        return stream_hashed(self._skeleton[name], self._hashes[name])

    def verify(self) -> None:
        """Compare every block with its hash.

        Raises:
            CorruptArtifactError: names the tensor and the bytes that differ.
            StorageError: the disk does not give them.
        """
        for name, blocks in self._blocks().items():
            rows = TableRows([self._skeleton[name]], {name: blocks})
            try:
                rows.verify()
            finally:
                rows.close()

    def close(self) -> None:
        """Close the files."""
        for rows in self._rows:
            rows.close()

    def _blocks(self) -> dict[str, CheckedBlocks]:
        return {
            name: CheckedBlocks(part, self._skeleton[name]) for name, part in self._parts.items()
        }
