"""JSON artifacts: pydantic models written atomically and read as hostile input."""

import hashlib
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moe_tool.artifacts.schema import FrozenModel
from moe_tool.errors import ArtifactVersionError, CorruptArtifactError
from moe_tool.formats.atomic_write import atomic_write_bytes
from moe_tool.formats.given_kind import kind_of
from moe_tool.formats.hostile_file import quoted, read_capped
from moe_tool.formats.strict_json import first_complaint, parse_json_object
from moe_tool.formats.wrong_kind import LOOKUP_HINT, Wanted, require_kind, wrong_kind

MAX_BYTES = 256 * 2**20
_SEAL = b',\n "sha256": "%s"\n}\n'
_SEALED = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
_COMMANDS = {
    "bit-prices": "moe-tool plan --average-bits, once this file is removed",
    "buddies": "moe-tool buddies",
    "bundle": "moe-tool pack, once its folder is removed",
    "hardware": "moe-tool hardware",
    "lookup-bundle": "moe-tool pack, once its folder is removed",
    "plan": "moe-tool plan",
}
_LABELS = {
    "bit-prices": "file of bit prices",
    "buddies": "buddy map",
    "bundle": "bundle manifest",
    "hardware": "hardware profile",
    "lookup-bundle": "lookup bundle",
    "plan": "plan",
    "profile": "profile",
}
_HINTS = {("lookup-bundle", "bundle"): LOOKUP_HINT}
"""Hints that help more than the remedy, by the kinds that were found and wanted"""

_GIVEN: dict[str, Wanted] = {"buddies": "buddies", "hardware": "hardware", "plan": "plan"}
"""Kinds whose paths are typed"""

Artifact = TypeVar("Artifact", bound=FrozenModel)


def write_json_artifact(path: Path, artifact: FrozenModel) -> None:
    """Write an artifact atomically; equal artifacts give equal bytes.

    The last key is `sha256`, over the file without that key: a changed digit is noticed.
    """
    text = artifact.model_dump_json(indent=1).encode()
    body = text.removesuffix(b"\n}")
    atomic_write_bytes(path, body + _SEAL % hashlib.sha256(text).hexdigest().encode())


def read_json_artifact(path: Path, kind: type[Artifact]) -> Artifact:
    """Read and validate an artifact.

    Raises:
        NotFoundError: there is no such file.
        CorruptArtifactError: it is damaged, or an artifact of another kind.
        ArtifactVersionError: it has another schema version.
        StorageError: it cannot be read.
    """
    wanted = kind.model_fields["kind"].default
    remedy = f"make it again with {_COMMANDS[wanted]}"
    if wanted in _GIVEN:
        require_kind(path, _GIVEN[wanted])
    text, seal = _unsealed(read_capped(path, limit_bytes=MAX_BYTES, remedy=remedy))
    parsed = parse_json_object(path, text, remedy=remedy)
    found_kind = parsed.get("kind")
    if found_kind != wanted:
        if wanted in _GIVEN:
            raise wrong_kind(path, kind_of(path), _GIVEN[wanted])
        what = _LABELS.get(found_kind) if isinstance(found_kind, str) else None
        raise CorruptArtifactError(
            f"{path} is {'a ' + what if what else 'not an artifact of moe-tool'}, "
            f"not a {_LABELS[wanted]}",
            hint=_HINTS.get((str(found_kind), wanted), remedy),
        )
    found, version = parsed.get("format_version"), kind.model_fields["format_version"].default
    if type(found) is not int or found != version:
        raise ArtifactVersionError(
            f"{path} has format version {quoted(found)}, wanted {version}", hint=remedy
        )
    _require_experts_fit(path, parsed, remedy)
    try:
        # JSON mode accepts lists for tuples, which the strict Python mode refuses.
        artifact = kind.model_validate_json(text)
    except ValidationError as error:
        raise CorruptArtifactError(
            f"{path} is damaged: {first_complaint(error)}", hint=remedy
        ) from error
    if seal is not None and hashlib.sha256(text).hexdigest().encode() != seal:
        raise CorruptArtifactError(
            f"{path} is damaged: its content does not fit its sha256", hint=remedy
        )
    return artifact


def json_artifact_kind(path: Path) -> str | None:
    """Return the `kind` of a JSON file, None without one; nothing else is checked.

    Raises:
        NotFoundError, CorruptArtifactError, StorageError: it is no JSON object that can be read.
    """
    remedy = "make it again with the command that wrote it"
    text, _ = _unsealed(read_capped(path, limit_bytes=MAX_BYTES, remedy=remedy))
    kind = parse_json_object(path, text, remedy=remedy).get("kind")
    return kind if isinstance(kind, str) else None


def _unsealed(text: bytes) -> tuple[bytes, bytes | None]:
    """Return the file without its `sha256` key, and that hash; None in a file written by hand."""
    found = _SEALED.search(text)
    if found is None:
        return text, None
    return text[: found.start()] + b"\n}", found[1]


def _require_experts_fit(path: Path, parsed: dict[str, Any], remedy: str) -> None:
    """Compare the number of primary records with that of experts, before loops run over either."""
    shape, forms = parsed.get("shape"), parsed.get("forms")
    if not isinstance(shape, dict) or not isinstance(forms, list):
        return
    layers, experts = shape.get("layers"), shape.get("experts")
    if not isinstance(layers, list) or not isinstance(experts, int):
        return
    primaries = [f for f in forms if isinstance(f, dict) and f.get("role") == "primary"]
    lists = [parsed.get("removed"), *(table.get("records") for table in primaries)]
    count = sum(len(found) for found in lists if isinstance(found, list))
    if len(layers) * experts != count:
        raise CorruptArtifactError(
            f"{path} is damaged: it has {count} records "
            f"for {len(layers)} layers of {quoted(experts)} experts",
            hint=remedy,
        )
