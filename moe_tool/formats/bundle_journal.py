"""The journal of a bundle under way: what is written, for whom, and which records are on the disk.

One line of JSON says what the bundle is made from; one line per record follows. Every line names
bytes that were synced before it, so that after a kill or a power cut all that it names is there.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_tool.artifacts.bundle_manifest import BundleManifest, ExpertRecord, Price, Xxh3
from moe_tool.artifacts.identity import ModelIdentity, require_same_model
from moe_tool.artifacts.precision import ExpertPrecision, bits_of
from moe_tool.errors import UsageError
from moe_tool.formats.atomic_write import atomic_write_bytes
from moe_tool.formats.bundle_files import JOURNAL
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.strict_json import parse_json_object

_MAX_BYTES = 2**30


class WrittenRecord(ExpertRecord):
    """A record as its line has it."""

    eps: Price | None = None
    """Its measured error, see ReplicaLayer: a resume need not make the record again to know"""
    base_xxh3: Xxh3 | None = None
    """Of the first bits of a nested expert"""
    base_eps: Price | None = None
    """Their measured error"""


class BundleOrder:
    """What was asked for: the model, the precision, and what else a bundle depends on."""

    def __init__(
        self, identity: ModelIdentity, precision: ExpertPrecision, made_from: dict[str, str]
    ) -> None:
        """Keep them."""
        self.identity = identity
        self.made_from = made_from
        self._precision = precision

    def require_same_bundle(self, folder: Path, found: BundleManifest) -> None:
        """Refuse a finished bundle of another order.

        Raises:
            WrongModelError, UsageError: name what was found and what is wanted.
        """
        self._require_same(folder, found.identity, _options(found.precision, found.made_from))

    def first_line(self) -> bytes:
        """Return the journal's first line."""
        options = _options(self._precision, self.made_from)
        head = {"identity": self.identity.model_dump(), "options": options}
        return json.dumps(head, sort_keys=True).encode() + b"\n"

    def require_same_journal(self, folder: Path, first_line: bytes) -> None:
        """Refuse an interrupted bundle of another order.

        Raises:
            CorruptArtifactError: the line is damaged.
            WrongModelError, UsageError: name what was found and what is wanted.
        """
        remedy = f"remove {folder} and pack again"
        head = parse_json_object(folder / JOURNAL, first_line, remedy=remedy)
        try:
            identity = ModelIdentity.model_validate(head.get("identity"))
        except ValidationError as error:
            raise UsageError(
                f"{folder} is not an interrupted bundle: its journal names no model", hint=remedy
            ) from error
        options = head.get("options")
        self._require_same(folder, identity, options if isinstance(options, dict) else {})

    def _require_same(self, folder: Path, identity: ModelIdentity, found: dict[str, Any]) -> None:
        remedy = f"choose another --out, or remove {folder}"
        require_same_model(identity, self.identity, artifact=f"the bundle {folder}", remedy=remedy)
        wanted = _options(self._precision, self.made_from)
        for key in sorted(found.keys() | wanted.keys()):
            old, new = found.get(key, "none"), wanted.get(key, "none")
            if old != new:
                raise UsageError(
                    f"{folder} was packed with {key} {quoted(old)}, asked is {quoted(new)}",
                    hint=f"repeat the command with the same options, {remedy}",
                )


def write_journal(folder: Path, order: BundleOrder, records: Sequence[WrittenRecord]) -> None:
    """Begin the journal of a folder, or begin it anew; it appears whole or not at all."""
    lines = b"".join(_line(record) for record in records)
    atomic_write_bytes(folder / JOURNAL, order.first_line() + lines)


def append_to_journal(folder: Path, records: Sequence[WrittenRecord]) -> None:
    """Add records, and wait until the disk has them."""
    with open(folder / JOURNAL, "ab") as file:
        file.write(b"".join(_line(record) for record in records))
        file.flush()
        os.fsync(file.fileno())


def read_journal(folder: Path, order: BundleOrder) -> list[bytes]:
    """Return the lines about records; the last may be torn.

    Raises:
        CorruptArtifactError, WrongModelError, UsageError: it is damaged or of another order.
    """
    with open(folder / JOURNAL, "rb") as file:
        first, *lines = file.read(_MAX_BYTES).split(b"\n")
    order.require_same_journal(folder, first)
    return [line for line in lines if line]


def _line(record: WrittenRecord) -> bytes:
    return record.model_dump_json().encode() + b"\n"


def _options(precision: ExpertPrecision, made_from: dict[str, str]) -> dict[str, str]:
    return {"precision": bits_of(precision), **made_from}
