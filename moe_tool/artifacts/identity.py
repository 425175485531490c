"""Identity of the model that an artifact belongs to, and the refusal of another model's."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from moe_tool.artifacts.schema import FrozenModel
from moe_tool.errors import WrongModelError

HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRevision:
    """A commit of a model on the hub."""

    hub_id: str
    commit: str


class ModelIdentity(FrozenModel):
    """Hashes that distinguish checkpoints, fine-tunes of one model included."""

    name: str
    """Name given by the user: an alias, a hub id or a folder's name. Never compared."""
    model_type: str
    """transformers' model type, e.g. "mixtral"."""
    quick: HexDigest
    """sha256 over the canonical config, every tensor's name, dtype and shape, and the bytes of
    routers and norms: cheap, and different between fine-tunes."""
    full: HexDigest | None = None
    """sha256 over every tensor's bytes, in name order; None until a stage has read them all."""

    def matches(self, other: "ModelIdentity") -> bool:
        """Return whether the weights are the same, by the full hash if both have one."""
        if self.full is not None and other.full is not None:
            return self.full == other.full
        return self.quick == other.quick


def require_same_model(
    found: ModelIdentity, wanted: ModelIdentity, *, artifact: str, remedy: str
) -> None:
    """Refuse an artifact that was made from another model.

    Args:
        artifact: subject of the message, e.g. "the profile profiles/demo.h5".
        remedy: the command that makes a matching one.

    Raises:
        WrongModelError: the identities differ.
    """
    if not found.matches(wanted):
        raise WrongModelError(
            f"{artifact} was made from {found.name} ({found.model_type}, {found.quick[:12]}), "
            f"this is {wanted.name} ({wanted.model_type}, {wanted.quick[:12]})",
            hint=remedy,
        )
