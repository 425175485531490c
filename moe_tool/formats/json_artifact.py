"""JSON artifacts: pydantic models written atomically and read as hostile input."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moe_tool.artifacts.schema import FrozenModel
from moe_tool.errors import (
    ArtifactVersionError,
    CorruptArtifactError,
    NotFoundError,
    StorageError,
)
from moe_tool.formats.atomic_write import atomic_write_bytes
from moe_tool.formats.strict_json import parse_json_object

MAX_BYTES = 512 * 2**20
_COMMANDS = {"buddies": "moe-tool buddies", "bundle": "moe-tool pack"}
_LABELS = {"buddies": "buddy map", "bundle": "bundle manifest", "profile": "profile"}

Artifact = TypeVar("Artifact", bound=FrozenModel)


def write_json_artifact(path: Path, artifact: FrozenModel) -> None:
    """Write an artifact, whole or not at all; the same artifact gives the same bytes."""
    atomic_write_bytes(path, (artifact.model_dump_json(indent=1) + "\n").encode())


def read_json_artifact(path: Path, kind: type[Artifact]) -> Artifact:
    """Read and validate an artifact.

    Args:
        path: of the file.
        kind: the class that it must be.

    Raises:
        NotFoundError: there is no such file.
        CorruptArtifactError: it is damaged, or an artifact of another kind.
        ArtifactVersionError: it has another schema version.
        StorageError: it cannot be read.
    """
    wanted = kind.model_fields["kind"].default
    remedy = f"make it again with {_COMMANDS[wanted]}"
    parsed = parse_json_object(path, _read(path, remedy), remedy=remedy)
    _require_kind(path, parsed, wanted, remedy)
    version = kind.model_fields["format_version"].default
    if parsed.get("format_version") != version:
        raise ArtifactVersionError(
            f"{path} has format version {str(parsed.get('format_version'))[:40]}, wanted {version}",
            hint=remedy,
        )
    try:
        # The JSON mode takes lists for tuples, which the strict Python mode would refuse.
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CorruptArtifactError(f"{path} is damaged: {_first(error)}", hint=remedy) from error


def _read(path: Path, remedy: str) -> bytes:
    if not path.exists():
        raise NotFoundError(f"{path} does not exist", hint=remedy)
    if not path.is_file():
        raise CorruptArtifactError(f"{path} is not a file", hint=remedy)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CorruptArtifactError(
                f"{path} has {size} bytes, wanted at most {MAX_BYTES}", hint=remedy
            )
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", hint="check the disk") from error


def _require_kind(path: Path, parsed: dict[str, Any], wanted: str, remedy: str) -> None:
    found = parsed.get("kind")
    if found == wanted:
        return
    what = _LABELS.get(found) if isinstance(found, str) else None
    raise CorruptArtifactError(
        f"{path} is {'a ' + what if what else 'not an artifact of moe-tool'}, not a {_LABELS[wanted]}",
        hint=remedy,
    )


def _first(error: ValidationError) -> str:
    """The first complaint: where it is and what it says, on one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
