"""Documents from local files and folders, by block, in bounded memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_tool.errors import DataSourceError, NotFoundError
from moe_tool.text.json_lines import count_line_blocks, read_line_block
from moe_tool.text.parquet_rows import count_row_groups, read_row_group
from moe_tool.text.text_blocks import block_range, count_blocks, interleave_blocks
from moe_tool.text.text_encoding import UTF8_BOM, conversion_hint, name_encoding

_TEXT_NAMES = (
    *("txt", "text", "md", "rst", "tex", "html", "xml", "csv", "tsv"),
    *("json", "yaml", "yml", "toml", "ini", "cfg", "ipynb"),
    *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "rs", "go", "java", "kt", "scala", "swift"),
    *("js", "jsx", "ts", "tsx", "css", "rb", "php", "pl", "sh", "sql", "r", "jl", "lua", "hs"),
    *("ml", "lisp", "el", "cs", "f90", "zig"),
)
SUPPORTED_SUFFIXES = frozenset(f".{name}" for name in (*_TEXT_NAMES, "jsonl", "parquet"))

_FORMS_HINT = (
    "give a UTF-8 text file, a .jsonl with a field 'text', a .parquet with a column 'text',"
    " or a folder of these"
)


def read_local_documents(path: Path, *, seed: int) -> Iterator[str]:
    """Return the documents of a file, or of all files with SUPPORTED_SUFFIXES below a folder.

    Plain text is cut into blocks of about 8 kB at blank lines, .jsonl by line, .parquet by row.
    Links to folders are followed, each folder once. Hidden and empty files are skipped. Files are
    visited in rounds (interleave_blocks), so that a sample is spread over all of them; no file is
    read further than the sample needs.

    Raises:
        NotFoundError: there is no such file or folder.
        DataSourceError: there is no text, or (also while iterating) a file is binary, not UTF-8,
            damaged or without a text field.
    """
    files = [path] if not path.is_dir() else _files_below(path)
    n_blocks = [_count_blocks(file) for file in files]
    if not any(n_blocks):
        raise DataSourceError(f"text source {path}: it is empty", hint=_FORMS_HINT)
    return _documents(files, n_blocks, seed=seed)


def _documents(files: list[Path], n_blocks: list[int], *, seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    found = False
    for file_index, block in interleave_blocks(n_blocks, rng=rng):
        file = files[file_index]
        try:
            for text in _read_block(file, block, rng):
                if text.strip():
                    found = True
                    yield text
        except OSError as error:
            raise DataSourceError(f"text source {file}: {error.strerror or error}") from error
    if not found:
        raise DataSourceError(
            f"text source {files[0]}: it holds only white space", hint=_FORMS_HINT
        )


def _files_below(folder: Path) -> list[Path]:
    found = []
    visited = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in visited:  # a link back to a folder already visited
            subfolders.clear()
            continue
        visited.add((place.st_dev, place.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            Path(parent) / name
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in SUPPORTED_SUFFIXES
        ]
    files = [file for file in found if file.is_file()]
    if not files:
        raise DataSourceError(
            f"text source {folder}: no file below it has a known text suffix",
            hint="known suffixes: " + " ".join(sorted(SUPPORTED_SUFFIXES)),
        )
    return files


def _count_blocks(file: Path) -> int:
    if not file.exists():
        raise NotFoundError(
            f"text source {file}: there is no such file or folder"
            f" (looked in {file.parent.absolute()})",
            hint="check the path, or use --data builtin, which needs no file",
        )
    if not file.is_file():
        raise DataSourceError(f"text source {file}: not a regular file", hint=_FORMS_HINT)
    size_bytes = file.stat().st_size
    if size_bytes == 0:
        return 0
    if file.suffix.lower() == ".parquet":
        return count_row_groups(file)
    if file.suffix.lower() == ".jsonl":
        return count_line_blocks(size_bytes)
    return count_blocks(size_bytes)


def _read_block(file: Path, block: int, rng: np.random.Generator) -> Iterator[str]:
    if file.suffix.lower() == ".parquet":
        yield from read_row_group(file, block, rng=rng)
    elif file.suffix.lower() == ".jsonl":
        yield from read_line_block(file, block)
    else:
        yield _read_text_block(file, block)


def _read_text_block(file: Path, block: int) -> str:
    with file.open("rb") as stream:

        def read(start: int, length: int) -> bytes:
            stream.seek(start)
            return stream.read(length)

        start, end = block_range(block, size_bytes=file.stat().st_size, read=read)
        content = read(start, end - start)
        beginning = read(0, 4)
    if start == 0:
        content = content.removeprefix(UTF8_BOM)
    kind = name_encoding(beginning)
    if kind is not None:
        raise DataSourceError(
            f"text source {file}: it is {kind}, not UTF-8 text",
            hint=conversion_hint(file, beginning=beginning),
        )
    if b"\0" in content:
        raise DataSourceError(
            f"text source {file}: it is binary (a zero byte at {start + content.index(0)})",
            hint=_FORMS_HINT,
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataSourceError(
            f"text source {file}: it is not UTF-8"
            f" (byte 0x{content[error.start]:02x} at {start + error.start})",
            hint=conversion_hint(file, beginning=beginning),
        ) from error
