"""Journal of a half-written bundle: what it is made from, and which records are on the disk.

The first line of JSON describes the inputs; one line per record, or per run of rows of a lookup
table, follows. A line is written after the bytes that it names were synced, so that they are on the
disk even after a power cut.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from moe_tool.artifacts.form_table import FormRecord, Price, Xxh3
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.schema import FrozenModel
from moe_tool.artifacts.source_files import PartsText
from moe_tool.errors import UsageError
from moe_tool.formats.atomic_write import atomic_write_bytes
from moe_tool.formats.bundle_files import JOURNAL
from moe_tool.formats.bundle_spec import Inputs
from moe_tool.formats.hostile_file import read_capped
from moe_tool.formats.strict_json import parse_json_object

_MAX_BYTES = 2**30


class WrittenRecord(FormRecord):
    """One record's line in the journal."""

    base_xxh3: Xxh3 | None = None
    """Hash of the base of a nested expert"""
    base_eps: Price | None = None
    """Measured error of the base"""
    parts: PartsText | None = None
    """Parts of a record that stays in the checkpoint's files"""


def write_journal(folder: Path, spec: Inputs, records: Sequence[FrozenModel]) -> None:
    """Write a folder's journal atomically, replacing an earlier one."""
    head = {"identity": spec.identity.model_dump(), "options": spec.options}
    first = json.dumps(head, sort_keys=True).encode() + b"\n"
    atomic_write_bytes(folder / JOURNAL, first + b"".join(map(_line, records)))


def append_to_journal(folder: Path, records: Sequence[FrozenModel]) -> None:
    """Append the lines of records and sync them."""
    with open(folder / JOURNAL, "ab") as file:
        file.write(b"".join(map(_line, records)))
        file.flush()
        os.fsync(file.fileno())


def read_journal(folder: Path, spec: Inputs) -> list[bytes]:
    """Return the lines about records; the last may be torn.

    Raises:
        CorruptArtifactError, WrongModelError, UsageError: it is damaged or for another bundle.
    """
    remedy = f"remove {folder} and pack again"
    data = read_capped(folder / JOURNAL, limit_bytes=_MAX_BYTES, remedy=remedy)
    first, *lines = data.split(b"\n")
    head = parse_json_object(folder / JOURNAL, first, remedy=remedy)
    try:
        identity = ModelIdentity.model_validate(head.get("identity"))
    except ValidationError as error:
        raise UsageError(
            f"{folder} is not an interrupted bundle: its journal names no model", hint=remedy
        ) from error
    options = head.get("options")
    spec.require_same(folder, identity, options if isinstance(options, dict) else {})
    return [line for line in lines if line]


def _line(record: FrozenModel) -> bytes:
    return record.model_dump_json().encode() + b"\n"
