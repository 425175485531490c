"""A pack of a MoLE that was stopped goes on where it was, and ends as if it had not been."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import (
    CorruptArtifactError,
    DiskFullError,
    MoeToolError,
    UsageError,
    WrongModelError,
)
from moe_tool.formats import lookup_writer
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.formats.lookup_writer import LookupWriter
from moe_tool.lookup import pack_lookup as packing
from moe_tool.lookup.pack_lookup import LookupReport, pack_lookup
from moe_tool.models.locate import LocatedModel
from tests.lookup.tiny_mole import make_mole
from tests.tiny_models import VOCABULARY

ROW_BYTES = 4 * 3 * 5 * 32
AT_ONCE = 20
_CHILD = """
import os, signal, sys
from moe_tool.cli.app import run_command
from moe_tool.formats import lookup_writer
from moe_tool.lookup import pack_lookup
model, out, count, name, at_once, sync = sys.argv[1:]
pack_lookup._BLOCK_BYTES, lookup_writer._SYNC_BYTES = int(at_once), int(sync)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
append, calls = lookup_writer.LookupWriter.append, []
def stopped(self, rows):
    append(self, rows)
    calls.append(len(rows))
    if len(calls) == int(count):
        os.kill(os.getpid(), getattr(signal, name))
lookup_writer.LookupWriter.append = stopped
sys.exit(run_command(["pack", model, "--out", out]))
"""


class Killed(BaseException):
    """What a test interrupts with."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_BLOCK_BYTES", AT_ONCE * ROW_BYTES)
    monkeypatch.setattr(lookup_writer, "_SYNC_BYTES", 3 * AT_ONCE * ROW_BYTES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mole(tmp_path_factory.mktemp("mole") / "model")


def pack(model: Path, out: Path, bits: str = "native") -> LookupReport:
    return pack_lookup(LocatedModel(folder=model, name="model"), bits=bits, out=out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int = 8) -> None:
    """Stop a pack as a kill would, without the process that it takes."""
    append, calls = LookupWriter.append, 0

    def stopped(writer: LookupWriter, rows: bytes) -> None:
        nonlocal calls
        append(writer, rows)
        calls += 1
        if calls == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(LookupWriter, "append", stopped)
        patch.setattr(LookupWriter, "suspend", lambda _: None)
        with pytest.raises(Killed):
            pack(model, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "n_durable"),
    # Rows are made durable after each third run of 20, and at Ctrl-C all of them.
    [("SIGKILL", -signal.SIGKILL, 6 * AT_ONCE), ("SIGINT", 130, 8 * AT_ONCE)],
)
def test_a_stopped_process_is_resumed(
    name: str, code: int, n_durable: int, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    words = [str(model), str(out), "8", name, str(AT_ONCE * ROW_BYTES)]
    command = [sys.executable, "-c", _CHILD, *words, str(3 * AT_ONCE * ROW_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert not out.exists()
    if name == "SIGINT":
        assert "finished work is kept" in done.stderr and "Traceback" not in done.stderr
    assert pack(model, out).resumed_rows == n_durable
    assert not (tmp_path / "bundle.part").exists()
    assert pack(model, tmp_path / "whole").resumed_rows == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_rows_that_changed_since_are_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, part = tmp_path / "bundle", tmp_path / "bundle.part"
    stop(model, out, monkeypatch)
    data = bytearray((part / "rows.safetensors").read_bytes())
    data[-3 * AT_ONCE * ROW_BYTES] ^= 1  # in the second of two durable runs, and a torn one
    (part / "rows.safetensors").write_bytes(data)
    with open(part / "journal.jsonl", "ab") as journal:
        journal.write(b'{"n_rows": 2')
    assert pack(model, out).resumed_rows == 3 * AT_ONCE
    assert pack(model, tmp_path / "whole").bytes
    assert contents(out) == contents(tmp_path / "whole")


def test_a_bundle_that_lacks_only_its_name_gets_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(lookup_writer.os, "rename", killed)
        with pytest.raises(Killed):
            pack(model, tmp_path / "bundle")
    with pytest.raises(UsageError, match="bits 'F32', now 'int8'"):
        pack(model, tmp_path / "bundle", bits="8")
    assert pack(model, tmp_path / "bundle").resumed_rows == VOCABULARY
    assert LookupBundle.open(tmp_path / "bundle").manifest.vocabulary == VOCABULARY


def test_a_whole_table_that_was_damaged_since_gets_no_name(model: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "bundle", tmp_path / "bundle.part"
    pack(model, out)
    out.rename(part)
    data = bytearray((part / "rows.safetensors").read_bytes())
    data[-ROW_BYTES // 2] ^= 1
    (part / "rows.safetensors").write_bytes(data)
    with pytest.raises(CorruptArtifactError):
        pack(model, out)
    assert not out.exists()
    assert pack(model, out).resumed_rows == 0


def test_what_was_begun_with_something_else_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    stop(model, out, monkeypatch)
    before = contents(tmp_path / "bundle.part")
    with pytest.raises(UsageError, match="bits 'F32', now 'nf4'"):
        pack(model, out, bits="nf4")
    with pytest.raises(WrongModelError):
        pack(make_mole(tmp_path / "other", seed=1), out)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_BLOCK_BYTES", 2 * AT_ONCE * ROW_BYTES)
        with pytest.raises(UsageError, match="rows at once"):
            pack(model, out)
    assert contents(tmp_path / "bundle.part") == before
    (tmp_path / "b.part").mkdir()
    (tmp_path / "b.part" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not an interrupted bundle"):
        pack(model, tmp_path / "b")
    assert (tmp_path / "b.part" / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_leaves_the_rows_that_are_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    append, calls = LookupWriter.append, 0

    def full(writer: LookupWriter, rows: bytes) -> None:
        nonlocal calls
        if calls == after:
            raise DiskFullError("the disk is full", hint="free some space")
        calls += 1
        append(writer, rows)

    out = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(LookupWriter, "append", full)
        with pytest.raises(DiskFullError):
            pack(model, out)
    assert (tmp_path / "bundle.part").exists() == bool(after)
    assert pack(model, out).resumed_rows == after * AT_ONCE


def _damaged_journal(part: Path) -> None:
    (part / "journal.jsonl").write_bytes(b"\x00 not json\n")


def _foreign_journal(part: Path) -> None:
    (part / "journal.jsonl").write_bytes(b'{"identity": {}, "options": []}\n')


def _linked_rows(part: Path) -> None:
    (part / "rows.safetensors").rename(part.parent / "elsewhere")
    (part / "rows.safetensors").symlink_to(part.parent / "elsewhere")


@pytest.mark.parametrize("damage", [_damaged_journal, _foreign_journal, _linked_rows])
def test_a_hostile_half_written_bundle_is_refused_and_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    out, part = tmp_path / "bundle", tmp_path / "bundle.part"
    stop(model, out, monkeypatch)
    damage(part)
    before = contents(part)
    with pytest.raises(MoeToolError) as refused:
        pack(model, out)
    assert refused.value.exit_code in (2, 3, 4) and "\n" not in refused.value.message
    assert str(part) in refused.value.message and contents(part) == before


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_file_of_somebody_else_is_neither_taken_nor_removed(
    is_whole: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, part = tmp_path / "bundle", tmp_path / "bundle.part"
    if is_whole:
        pack(model, out)
        out.rename(part)
    else:
        stop(model, out, monkeypatch)
    (part / "notes.txt").write_text("mine")
    before = contents(part)
    refusal = r"notes\.txt is no file of an interrupted bundle"
    with pytest.raises(UsageError, match=refusal) as found:
        pack(model, out)
    assert "move it out" in (found.value.hint or "") and contents(part) == before
    (part / "notes.txt").unlink()
    assert pack(model, out).resumed_rows
    assert contents(out) == contents(pack(model, tmp_path / "whole").bundle)


def test_a_journal_that_is_no_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle.part").mkdir()
    os.mkfifo(tmp_path / "bundle.part" / "journal.jsonl")
    with pytest.raises(MoeToolError, match=r"journal\.jsonl is not a file"):
        pack(model, tmp_path / "bundle")
