"""Prefetch policy with parameters, as `--prefetch` names it."""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_tool.errors import UsageError
from moe_tool.policies.parameters import Parameter, changed_words, read_values, whole_number

NO_PREFETCH = "none"
PREFETCH: Mapping[str, Mapping[str, Parameter]] = {
    NO_PREFETCH: {},
    "next-layer": {},
    "stacked": {"depth": whole_number("layers looked ahead at most", default=3, most=8)},
    "partial": {
        "alpha": Parameter(
            help="an expert is read ahead if it scores at least 1 + alpha times the best that is "
            "not chosen",
            default=0.3,
        )
    },
}
"""Parameters of every way to choose by the name that `--prefetch` takes"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchChoice:
    """A way to choose and its options."""

    name: str
    """Text from which `parse_prefetch` makes this choice; defaults left out"""
    depth: int
    """Layers looked ahead at most; 0 reads nothing before it is wanted"""
    alpha: float | None = None
    """Band of near-ties that are not read ahead, where the next layer is run on part of this one's
    output; None: routers see this layer's input"""


def parse_prefetch(text: str) -> PrefetchChoice:
    """Parse a word like "next-layer" or "stacked:depth=2".

    Raises:
        UsageError: the name or a parameter is unknown, or a value is out of range.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in PREFETCH:
        raise UsageError(
            f"--prefetch {text} is not known", hint=f"use one of {', '.join(PREFETCH)}"
        )
    words = rest.split(",") if rest else []
    values = read_values(f"--prefetch {text}", words, PREFETCH[kind])
    changed = ",".join(changed_words(values, PREFETCH[kind]))
    depth = int(values.get("depth", 0 if kind == NO_PREFETCH else 1))
    return PrefetchChoice(
        name=f"{kind}:{changed}" if changed else kind, depth=depth, alpha=values.get("alpha")
    )
