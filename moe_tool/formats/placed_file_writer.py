"""Writer of a record file that is not written: its records stay in the checkpoint's files."""

import hashlib
from collections.abc import Sequence

import torch
import xxhash

from moe_tool.artifacts.bundle_sections import SOURCE_FILES, Section
from moe_tool.artifacts.source_files import PlacedTable, SourceFiles, parse_parts
from moe_tool.formats.bundle_files import ExpertFile
from moe_tool.formats.bundle_journal import WrittenRecord
from moe_tool.formats.hostile_file import reading
from moe_tool.formats.record_layout import RecordLayout
from moe_tool.formats.record_sources import RecordSources, require_filled


class PlacedFileWriter:
    """Running sha256 of the file that would be written; the interface of RecordFileWriter."""

    def __init__(self, file: ExpertFile, layout: RecordLayout, sources: RecordSources) -> None:
        """Begin with the header; `sources` belongs to the caller."""
        self._layout = layout
        self._sources = sources
        self._digest = hashlib.sha256(file.header)

    def append(self, data: memoryview) -> None:
        """Add the next record."""
        self._digest.update(data)

    def take_over(self, position: int, record: WrittenRecord) -> bool:
        """Accept a record that lies in the sources; return False if its hash does not match."""
        del position
        try:
            parts = parse_parts(record.parts or "")
            require_filled(parts, self._layout)
        except ValueError:
            return False
        if any(part.file >= len(self._sources.paths) for part in parts):
            return False
        data = torch.empty(self._layout.size_bytes, dtype=torch.uint8)
        with reading(self._sources.folder):
            self._sources.read_into(parts, self._layout, data)
        if xxhash.xxh3_64_hexdigest(data.numpy().data) != record.xxh3:
            return False
        self._digest.update(data.numpy().data)
        return True

    def cut(self, n_records: int) -> None:
        """Do nothing: records that were not taken over are not in the sum."""

    def sync(self) -> None:
        """Do nothing: there is no file."""

    def close(self) -> str:
        """Return the sha256 of the header and the records."""
        return self._digest.hexdigest()


def source_sections(
    sources: RecordSources | None,
    order: Sequence[tuple[int, int, int]],
    records: Sequence[WrittenRecord],
) -> dict[str, Section]:
    """Return the manifest's section about records that stay in the checkpoint's files, by its name.

    Args:
        sources: the files; None: everything is written.
        order: (form, layer, expert) of every record.
        records: the same in the journal.
    """
    if sources is None:
        return {}
    tables: dict[int, list[str]] = {}
    for (form, _, _), record in zip(order, records, strict=True):
        if record.parts is not None:
            tables.setdefault(form, []).append(record.parts)
    body = SourceFiles(
        folder=str(sources.folder),
        resolved=str(sources.folder.resolve()),
        files=sources.files,
        tables=tuple(PlacedTable(form=form, parts=tuple(each)) for form, each in tables.items()),
    )
    return {SOURCE_FILES: Section(required=True, body=body.model_dump(mode="json"))}
