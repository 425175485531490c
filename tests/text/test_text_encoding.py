"""Text in other encodings, packed text and linked folders: read, or refused with a command that
works."""

import shutil
import subprocess
from pathlib import Path

import pytest

from moe_tool.cli.run import _read_prompt
from moe_tool.errors import DataSourceError
from moe_tool.text.local_files import read_local_documents

WORDS = "café and a few more words\n\n" * 30


def refusal(file: Path) -> DataSourceError:
    with pytest.raises(DataSourceError) as caught:
        list(read_local_documents(file, seed=0))
    return caught.value


def follow(hint: str | None) -> None:
    """Run the command that a hint shows, as it is typed into a shell."""
    assert hint is not None
    command = hint.partition(": ")[2].partition(", and give")[0]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"no {command.split()[0]} here")
    subprocess.run(["/bin/sh", "-c", command], check=True)


@pytest.mark.parametrize(
    ("encoding", "says"), [("latin-1", "not UTF-8 (byte 0xe9 at 3)"), ("utf-16", "it is UTF-16")]
)
def test_the_hint_about_an_encoding_gives_the_text(
    encoding: str, says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "my texts"
    folder.mkdir()
    file = folder / "it's mine.txt"
    file.write_bytes(WORDS.encode(encoding))
    error = refusal(file)
    assert says in error.message
    follow(error.hint)
    texts = list(read_local_documents(folder / "utf8-it's mine.txt", seed=0))
    assert "".join(texts) == WORDS


def test_the_hint_about_a_packed_file_gives_the_text(tmp_path: Path) -> None:
    import gzip

    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    error = refusal(file)
    assert "it is gzip" in error.message
    follow(error.hint)
    assert sorted(read_local_documents(tmp_path / "a.jsonl", seed=0)) == ["one", "two"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    real, data = tmp_path / "real", tmp_path / "data"
    (real / "deeper").mkdir(parents=True)
    data.mkdir()
    (real / "deeper" / "a.txt").write_text("from afar")
    (data / "b.txt").write_text("near")
    (data / "link").symlink_to(real)
    (data / "again").symlink_to(real)
    (real / "loop").symlink_to(data)
    assert sorted(read_local_documents(data, seed=0)) == ["from afar", "near"]


def test_a_mark_of_utf8_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    assert _read_prompt(None, None, tmp_path / "p.txt") == "hello\n"


def test_the_hint_about_a_prompt_in_latin_1_gives_the_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataSourceError) as caught:
        _read_prompt(None, None, file)
    follow(caught.value.hint)
    assert _read_prompt(None, None, tmp_path / "utf8-p.txt") == "café"


@pytest.mark.parametrize(
    ("line", "says", "hint"),
    [
        ('{"messages": [{"content": "a"}]}', "none of them a string: messages", "chat template"),
        ('{"text": ["a"]}', "the field text holds a list, not text", "one string"),
        ('{"instruction": "a"}', "fields found: instruction", "rename"),
    ],
)
def test_rows_of_another_form_are_refused_with_what_they_hold(
    line: str, says: str, hint: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line + "\n")
    error = refusal(file)
    assert says in error.message
    assert hint in (error.hint or "")


def test_a_text_that_is_null_is_an_empty_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": null}\n{"text": null, "content": "two"}\n')
    assert list(read_local_documents(file, seed=0)) == ["one", "two"]
