"""Full hash of a checkpoint, computed while its tensors are read for another purpose."""

import hashlib
from collections.abc import Iterable, Mapping


class FullHash:
    """Collector of one sha256 per tensor, or per row of tensors read row by row, in any order."""

    def __init__(self, digests: Mapping[str, str] | None = None) -> None:
        """Start, or continue from the `digests` of an interrupted run."""
        self._digests: dict[str, str] = dict(digests or {})

    def add(self, name: str, row: int | None, data: memoryview) -> None:
        """Add the bytes of a tensor or of a row; a listener for `Checkpoint.on_read`."""
        key = name if row is None else f"{name} {row:06d}"
        self._digests[key] = hashlib.sha256(data).hexdigest()

    def add_streamed(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Add the bytes of a whole tensor that is read in pieces, unless it was added before."""
        if name not in self._digests:
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
            self._digests[name] = digest.hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """Hex digests by tensor name, or by tensor name and row."""
        return dict(sorted(self._digests.items()))

    def result(self) -> str:
        """Return the sha256 over all names and digests, in the order of names and rows."""
        lines = (f"{key} {digest}\n" for key, digest in self.digests.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()
