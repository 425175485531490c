"""Protection of another model's artifact from being overwritten under a default name."""

from pathlib import Path

from pydantic import ValidationError

from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.errors import MoeToolError, UsageError
from moe_tool.formats.hostile_file import read_capped
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.formats.strict_json import parse_json_object

_MAX_JSON_BYTES = 2**30


def require_unclaimed(path: Path, identity: ModelIdentity, *, remedy: str | None = None) -> Path:
    """Return a default path, if no other model's artifact lies there.

    Two checkpoints may be called alike (`a/checkpoint-500`, `b/checkpoint-500`). An unreadable
    file may be replaced.

    Args:
        remedy: the option that names another place; None: --out with a free name.

    Raises:
        UsageError: another model's artifact is there; the hint names a free place.
    """
    owner = _owner(path)
    if owner is None or owner.matches(identity):
        return path
    free = path.with_name(f"{identity.quick[:12]}-{path.name}")
    raise UsageError(
        f"{path} belongs to another model called {owner.name} ({owner.model_type}, "
        f"{owner.quick[:12]}), this is {identity.name} ({identity.model_type}, "
        f"{identity.quick[:12]})",
        hint=f"{remedy or f'--out {free}'}, or move the other away",
    )


def _owner(path: Path) -> ModelIdentity | None:
    try:
        if path.suffix == ".h5":
            with ProfileReader.open(path) as profile:
                return profile.header.identity
        text = read_capped(path, limit_bytes=_MAX_JSON_BYTES, remedy="")
        return ModelIdentity.model_validate(
            parse_json_object(path, text, remedy="").get("identity")
        )
    except (MoeToolError, ValidationError):
        return None
