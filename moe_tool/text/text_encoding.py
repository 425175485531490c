"""Hints for text that is not UTF-8: commands that convert it."""

import shlex
from pathlib import Path

UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"


def name_encoding(beginning: bytes) -> str | None:
    """Return the encoding that a file's first bytes reveal, other than UTF-8; None if unknown."""
    if beginning.startswith(_UTF16_BOMS):
        return "UTF-16"
    return "gzip" if beginning.startswith(_GZIP) else None


def conversion_hint(file: Path | None, *, beginning: bytes) -> str:
    """Return a command that converts a file to UTF-8.

    Args:
        file: the file; None: stdin.
        beginning: its first four bytes, fewer if it is shorter.
    """
    kind = name_encoding(beginning)
    is_utf16 = kind == "UTF-16"
    command = f"iconv -f {'UTF-16' if is_utf16 else 'LATIN1'} -t UTF-8"
    if file is None:
        return f"convert it: {command}"
    source = shlex.quote(str(file))
    if kind == "gzip":
        name = file.name.removesuffix(".gz") if file.suffix == ".gz" else f"unpacked-{file.name}"
        target = shlex.quote(str(file.with_name(name)))
        return f"unpack it: gzip -dc < {source} > {target}, and give that in its place"
    target = shlex.quote(str(file.with_name(f"utf8-{file.name}")))
    condition = "" if is_utf16 else " if it is Latin-1"
    return f"convert it{condition}: {command} {source} > {target}, and give that in its place"
