"""Hashes of a tensor's blocks: made while it is written, compared when a block is first read."""

from collections.abc import Iterable, Iterator

import xxhash

from moe_tool.artifacts.row_tables import HashedBlocks
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import TensorInfo


class BlockHasher:
    """Hashes of blocks, over bytes that come in pieces of any size."""

    def __init__(self, block_bytes: int) -> None:
        """Begin with the first block."""
        self._block_bytes = block_bytes
        self._found: list[str] = []
        self._open = xxhash.xxh3_64()
        self._n_open = 0

    def passed(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """Yield the pieces after hashing each."""
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                part = view[: self._block_bytes - self._n_open]
                self._open.update(part)
                self._n_open += len(part)
                view = view[len(part) :]
                if self._n_open == self._block_bytes:
                    self._end_block()
            yield piece

    def result(self) -> str:
        """Return the hashes, one behind the other; nothing may follow."""
        if self._n_open:
            self._end_block()
        return "".join(self._found)

    def _end_block(self) -> None:
        self._found.append(self._open.hexdigest())
        self._open, self._n_open = xxhash.xxh3_64(), 0


class CheckedBlocks:
    """Blocks of one tensor, each of which is hashed once."""

    def __init__(self, hashed: HashedBlocks, info: TensorInfo) -> None:
        """Begin with no block known to be right."""
        self.block_bytes = hashed.block_bytes
        self._info = info
        self._hashes = hashed.hashes
        self._known = bytearray(len(self._hashes))

    @property
    def n_blocks(self) -> int:
        """Number of blocks"""
        return len(self._hashes)

    def n_known(self, first: int, last: int) -> int:
        """Return how many blocks from `first` to `last` are known to be right, up to the first that
        is not."""
        unknown = self._known.find(0, first, last + 1)
        return (last + 1 if unknown < 0 else unknown) - first

    def span(self, number: int) -> tuple[int, int]:
        """Return where a block begins and ends in the tensor."""
        begin = number * self.block_bytes
        return begin, min(begin + self.block_bytes, self._info.size_bytes)

    def require(self, number: int, data: memoryview) -> None:
        """Compare a block with its hash.

        Raises:
            CorruptArtifactError: it is another one.
        """
        if xxhash.xxh3_64_hexdigest(data) != self._hashes[number]:
            begin, end = self.span(number)
            raise CorruptArtifactError(
                f"{self._info.file} is damaged: the hash of bytes {begin} to {end} of "
                f"{quoted(self._info.name)} does not fit",
                hint="remove the folder and pack the bundle again with moe-tool pack",
            )
        self._known[number] = 1
