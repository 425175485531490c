"""Description of an artifact, and the facts that several kinds share."""

from dataclasses import dataclass, field
from pathlib import Path

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.artifacts.routing_report import ProfileRouting

Tabled = BitPrices | HardwareProfile | PackPlan | ProfileRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Description of one artifact."""

    kind: str
    path: Path
    checked: str
    """Evidence for `is_intact`"""
    facts: dict[str, object]
    """Facts in display order"""
    is_intact: bool = True
    """False for an unfinished artifact; a damaged one is refused instead"""
    details: dict[str, object] = field(default_factory=dict)
    """Longer parts, for `--json` only"""
    tabled: Tabled | None = None
    """Artifact shown as tables below the facts"""

    def to_json(self) -> dict[str, object]:
        """Return the fields of `--json`."""
        return {
            "kind": self.kind,
            "path": self.path,
            "intact": self.is_intact,
            "checked": self.checked,
            **self.facts,
            **self.details,
        }


def named_facts(artifact: object, *names: str) -> dict[str, object]:
    """Return fields of an artifact under their own names."""
    return {name: getattr(artifact, name) for name in names}


def model_facts(identity: ModelIdentity) -> dict[str, object]:
    """Return the facts that identify an artifact's model."""
    return {
        "model": identity.name,
        "model_type": identity.model_type,
        "identity": identity.quick,
        "full_identity": identity.full,
    }


def shape_facts(shape: MoeShape) -> dict[str, object]:
    """Return the facts on a model's shape."""
    return {
        "decoder_layers": shape.n_decoder_layers,
        "layers": len(shape.layers),
        "experts": shape.experts,
        "top_k": shape.top_k,
        "dtype": shape.dtype,
    }


def residents_by(share: float) -> str:
    """Return what residents under `priced` are chosen by, for a share as in `--robust`."""
    return f"{1 - share:.0%} mean use, {share:.0%} worst case over domains (--robust {share:g})"
