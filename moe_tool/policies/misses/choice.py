"""A miss policy by name, with its parameters: what `--policy` takes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from moe_tool.errors import NotFoundError, UnsupportedModelError, UsageError
from moe_tool.policies.misses.buddy import Buddy, buddy_tables
from moe_tool.policies.misses.drop import Drop
from moe_tool.policies.misses.exact import Exact
from moe_tool.policies.misses.gates import Gates
from moe_tool.policies.misses.near_tie import NearTie
from moe_tool.policies.misses.next_ranked import NextRanked
from moe_tool.policies.misses.price_book import PriceBook
from moe_tool.policies.misses.priced import Priced
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs, Reweigh
from moe_tool.policies.misses.prune import Prune
from moe_tool.policies.misses.prune_learned import PruneLearned
from moe_tool.policies.misses.prune_random import PruneRandom
from moe_tool.policies.misses.random_resident import RandomResident
from moe_tool.policies.misses.replica import Replica

Values = Mapping[str, float]
Residents = Literal["hottest", "two-precisions", "cheapest"]
"""Who is in memory under frozen residency: the experts used most; those and, in a part of the
memory, the cheaper forms of those used most; or what makes the expected price least."""


def _exact(inputs: PolicyInputs, values: Values) -> MissPolicy:
    return Exact()


def _drop(inputs: PolicyInputs, values: Values) -> MissPolicy:
    return Drop(gates=_gates(inputs, "drop", values))


def _buddy(inputs: PolicyInputs, values: Values) -> MissPolicy:
    if inputs.buddies is None:
        raise UsageError(
            "--policy buddy: this bundle has no buddies", hint="pack it again with --buddies FILE"
        )
    return Buddy(
        gates=_gates(inputs, "buddy", values),
        tables=buddy_tables(inputs.buddies),
        logit_weight=values["eta"],
    )


def _random(inputs: PolicyInputs, values: Values) -> MissPolicy:
    return RandomResident(gates=_gates(inputs, "random", values), seed=inputs.seed)


def _next_ranked(inputs: PolicyInputs, values: Values) -> MissPolicy:
    return NextRanked(
        gates=_gates(inputs, "next-ranked", values), reweigh=_reweigh(inputs, "next-ranked")
    )


def _near_tie(inputs: PolicyInputs, values: Values) -> MissPolicy:
    return NearTie(
        alpha=values["alpha"],
        reweigh=_reweigh(inputs, "near-tie"),
        scores_are_logits=inputs.scores_are_logits,
    )


def _replica(inputs: PolicyInputs, values: Values) -> MissPolicy:
    n_forms = len(inputs.forms)
    if n_forms < 2:
        raise UsageError(
            "--policy replica: this bundle has no replicas", hint="pack it again with --replicas 2"
        )
    form = int(values["level"])
    if form >= n_forms:
        raise UsageError(
            f"--policy replica: there is no level {form}",
            hint=f"the bundle has replicas 1 to {n_forms - 1}: {', '.join(inputs.forms[1:])}",
        )
    found = np.mean(list(inputs.unimportance.values()), axis=0) if inputs.unimportance else None
    t1, t2 = (
        _quantile(found, share)
        for share in (values["high"], min(1.0, values["high"] + values["low"]))
    )
    return Replica(t1=t1, t2=t2, form=form, stored=inputs.stored)


def _prune(inputs: PolicyInputs, values: Values) -> MissPolicy:
    if not inputs.ratios:
        raise UsageError(
            "--policy prune: this bundle was packed without a profile",
            hint="pack it again with --profile FILE",
        )
    share = values["share"]
    limit = {layer: _quantile(found, share) for layer, found in inputs.ratios.items()}
    if share == 0:
        limit = dict.fromkeys(limit, 0.0)
    return Prune(limit=limit, share=share, protect=values["protect"])


def _prune_learned(inputs: PolicyInputs, values: Values) -> MissPolicy:
    learned = inputs.pruning
    _require_several(inputs, "prune:learned")
    if learned is None:
        raise NotFoundError(
            "--policy prune:learned: nothing was learned about pruning this bundle",
            hint="train it first: moe-tool tune pruning BUNDLE --data ...",
        )
    rate = learned.rate if values["rate"] < 0 else values["rate"]
    share = _share_of_light(inputs, "prune:learned", rate)
    offset = -math.inf if share == 0 else _quantile(np.array(learned.offsets), share)
    return PruneLearned(offset=offset, rate=rate)


def _prune_random(inputs: PolicyInputs, values: Values) -> MissPolicy:
    _require_several(inputs, "prune:random")
    share = _share_of_light(inputs, "prune:random", values["rate"])
    return PruneRandom(share=share, seed=inputs.seed)


def _require_several(inputs: PolicyInputs, name: str) -> None:
    if inputs.top_k < 2:
        raise UnsupportedModelError(
            f"--policy {name}: this model has one expert per token, so none can be left out",
            hint="take --policy exact",
        )


def _share_of_light(inputs: PolicyInputs, name: str, rate: float) -> float:
    """The share of the slots after the heaviest that a share of all is."""
    most = (inputs.top_k - 1) / inputs.top_k
    if rate > most:
        raise UsageError(
            f"--policy {name}: a rate of {rate:g} would leave a token without experts",
            hint=f"of {inputs.top_k} experts per token {most:g} can be left out",
        )
    return min(1.0, rate / most)


def _priced(inputs: PolicyInputs, values: Values) -> MissPolicy:
    return Priced(
        book=_book(inputs, "priced"),
        nats_per_mb=values["nats-per-mb"],
        reroute=values["reroute"],
        reweigh=inputs.reweigh,
        scores_are_logits=inputs.scores_are_logits,
    )


def _book(inputs: PolicyInputs, name: str) -> PriceBook:
    if inputs.prices is None:
        raise UsageError(
            f"--policy {name}: this bundle was packed without a profile, so it has no prices",
            hint="pack it again with --profile FILE",
        )
    return inputs.prices


def _reweigh(inputs: PolicyInputs, name: str) -> Mapping[int, Reweigh]:
    if inputs.reweigh is None:
        raise UsageError(
            f"--policy {name}: the rule by which this model weighs its experts is not known",
            hint="take --policy buddy, random, drop or exact",
        )
    return inputs.reweigh


def _gates(inputs: PolicyInputs, name: str, values: Values) -> Gates:
    if inputs.gates is None:
        raise UsageError(
            f"--policy {name}: this bundle has no buddies, so the gates' thresholds are not known",
            hint="pack it again with --buddies FILE, or add --no-gates",
        )
    gates = inputs.gates
    if values["beta"] != _BUDDY_GATES["beta"].default:
        gates = replace(gates, bypass_share=values["beta"])
    gates = replace(gates, max_margin=values["gamma"])
    if values["rho"] >= 0:
        gates = replace(gates, max_substitutions=int(values["rho"]))
    return gates


def _quantile(table: np.ndarray | None, share: float) -> float:
    """Read a table of equally spaced quantiles."""
    if table is None:
        return share
    return float(np.interp(share, np.linspace(0, 1, len(table)), table))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    default: float
    least: float = 0
    most: float = 1
    whole: bool = False


_BUDDY_GATES = {
    "rho": _Range(default=-1, least=-1, most=1024, whole=True),
    "beta": _Range(default=0.6, least=0, most=2),
    "gamma": _Range(default=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    make: Callable[[PolicyInputs, Values], MissPolicy]
    """Raises UsageError where the policy cannot be made from the inputs"""
    parameters: Mapping[str, _Range] = field(default_factory=dict)
    residents: Residents = "hottest"
    weighs_prompts: bool = False
    """Whether it asks which of a prompt's tokens matter"""
    asks_router: bool = False
    """Whether it asks the bundle's trained mask routers"""


MISS_POLICIES: Mapping[str, _Kind] = {
    "exact": _Kind(make=_exact),
    "buddy": _Kind(
        make=_buddy, parameters={**_BUDDY_GATES, "eta": _Range(default=0, least=0, most=100)}
    ),
    "drop": _Kind(make=_drop, parameters=_BUDDY_GATES),
    "random": _Kind(make=_random, parameters=_BUDDY_GATES),
    "next-ranked": _Kind(make=_next_ranked, parameters=_BUDDY_GATES),
    "near-tie": _Kind(make=_near_tie, parameters={"alpha": _Range(default=0.3)}),
    "replica": _Kind(
        make=_replica,
        parameters={
            "high": _Range(default=0.67),
            "low": _Range(default=0.3),
            "level": _Range(default=1, least=1, most=64, whole=True),
            "part": _Range(default=0.2),
        },
        residents="two-precisions",
    ),
    "prune": _Kind(
        make=_prune,
        parameters={"share": _Range(default=0.5), "protect": _Range(default=0.02)},
        weighs_prompts=True,
    ),
    "prune:learned": _Kind(
        make=_prune_learned, parameters={"rate": _Range(default=-1, least=-1)}, asks_router=True
    ),
    "prune:random": _Kind(make=_prune_random, parameters={"rate": _Range(default=0.2)}),
    "priced": _Kind(
        make=_priced,
        parameters={
            "nats-per-mb": _Range(default=math.inf, least=0, most=math.inf),
            "reroute": _Range(default=0.5, least=0, most=2),
        },
        residents="cheapest",
    ),
}
"""Every miss policy by the name that `--policy` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MissChoice:
    """A policy and its parameters."""

    kind: str
    """Key of MISS_POLICIES"""
    values: Values
    """All of the kind's parameters"""

    @property
    def name(self) -> str:
        """What `parse_miss_policy` makes this choice from; defaults left out."""
        ranges = MISS_POLICIES[self.kind].parameters
        words = [f"{key}={_word(v)}" for key, v in self.values.items() if v != ranges[key].default]
        return self.kind + (":" + ",".join(words) if words else "")

    @property
    def residents(self) -> Residents:
        """Who is in memory under frozen residency."""
        return MISS_POLICIES[self.kind].residents

    @property
    def weighs_prompts(self) -> bool:
        """Whether the policy asks which of a prompt's tokens matter: that takes attention sums."""
        return MISS_POLICIES[self.kind].weighs_prompts

    @property
    def asks_router(self) -> bool:
        """Whether the policy asks the bundle's trained mask routers."""
        return MISS_POLICIES[self.kind].asks_router

    def with_value(self, parameter: str, value: float) -> "MissChoice":
        """Return the policy with another value of one of its parameters."""
        assert parameter in self.values
        return parse_miss_policy(replace(self, values={**self.values, parameter: value}).name)

    def make(self, inputs: PolicyInputs) -> MissPolicy:
        """Return the policy.

        Raises:
            UsageError: the inputs lack what it needs.
            NotFoundError: what it asks has not been trained.
            UnsupportedModelError: it means nothing for this model.
        """
        return MISS_POLICIES[self.kind].make(inputs, self.values)


def parse_miss_policy(text: str) -> MissChoice:
    """Return what a word like "exact", "buddy:rho=1" or "priced:nats-per-mb=0.01" means.

    Raises:
        UsageError: the policy or a parameter is unknown, or its value is no number it can have.
    """
    word = text.strip()
    named = [kind for kind in MISS_POLICIES if f"{word}:".startswith(f"{kind}:")]
    kind = max(named, key=len, default=word.partition(":")[0])
    rest = word[len(kind) + 1 :]
    if kind not in MISS_POLICIES:
        raise UsageError(
            f"--policy {kind} is not known", hint=f"use one of {', '.join(MISS_POLICIES)}"
        )
    ranges = MISS_POLICIES[kind].parameters
    values = {key: each.default for key, each in ranges.items()}
    for word in rest.split(",") if rest else ():
        key, _, number = word.partition("=")
        if key not in ranges:
            known = ", ".join(f"{name}={value:g}" for name, value in values.items())
            raise UsageError(
                f"--policy {text}: {word!r} is not known",
                hint=f"it takes {known}" if known else f"{kind} takes no parameter",
            )
        values[key] = _number(text, word, number, ranges[key])
    return MissChoice(kind=kind, values=values)


def _word(value: float) -> str:
    """The shortest text that is read as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _number(text: str, word: str, number: str, allowed: _Range) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    is_whole = not allowed.whole or value == math.floor(value) if math.isfinite(value) else True
    if not allowed.least <= value <= allowed.most or not is_whole:
        kind = "a whole number" if allowed.whole else "a number"
        raise UsageError(
            f"--policy {text}: {word!r} is out of range",
            hint=f"{kind} from {allowed.least:g} to {allowed.most:g} is possible",
        )
    return value
