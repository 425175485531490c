"""Miss policy with parameters, as `--policy` names it."""

from dataclasses import dataclass, field, replace

from moe_tool.errors import UsageError
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs
from moe_tool.policies.misses.registry import MISS_POLICIES
from moe_tool.policies.misses.spec import PolicySpec, Values
from moe_tool.policies.parameters import changed_words, read_values


@dataclass(frozen=True, slots=True, kw_only=True)
class MissChoice:
    """A policy and its parameters."""

    spec: PolicySpec
    values: Values = field(hash=False)
    """Value of every parameter of the policy"""

    @property
    def name(self) -> str:
        """Text from which `parse_miss_policy` makes this choice; defaults left out."""
        words = changed_words(self.values, self.spec.parameters)
        for parameter, others in self.spec.replaces.items():
            if any(word.startswith(f"{parameter}=") for word in words):
                implied = changed_words(others, self.spec.parameters)
                words = tuple(word for word in words if word not in implied)
        return self.spec.name + (":" + ",".join(words) if words else "")

    def with_value(self, parameter: str, value: float) -> "MissChoice":
        """Return the policy with another value of one of its parameters."""
        assert parameter in self.values
        values = {**self.values, **self.spec.replaces.get(parameter, {}), parameter: value}
        return parse_miss_policy(replace(self, values=values).name)

    def make(self, inputs: PolicyInputs) -> MissPolicy:
        """Return the policy.

        Raises:
            UsageError: a required input is missing.
            NotFoundError: the mask routers have not been trained.
            UnsupportedModelError: the policy does not apply to this model.
        """
        for need in self.spec.needs:
            need.require(self.spec.name, inputs)
        return self.spec.make(inputs, self.values)


def parse_miss_policy(text: str) -> MissChoice:
    """Parse a word like "exact", "buddy:rho=1", "buddy:published" or "priced:nats-per-mb=0.01".

    Parameters that follow a preset change its values.

    Raises:
        UsageError: the policy or a parameter is unknown, or a value is out of range.
    """
    word = text.strip()
    named = [kind for kind in MISS_POLICIES if f"{word}:".startswith(f"{kind}:")]
    kind = max(named, key=len, default=word.partition(":")[0])
    rest = word[len(kind) + 1 :]
    if kind not in MISS_POLICIES:
        names = [
            name
            for spec in MISS_POLICIES.values()
            for name in (spec.name, *(f"{spec.name}:{preset}" for preset in spec.presets))
        ]
        raise UsageError(f"--policy {kind} is not known", hint=f"use one of {', '.join(names)}")
    spec, words = MISS_POLICIES[kind], rest.split(",") if rest else []
    if words and words[0] in spec.presets:
        words = [*spec.preset_words(words[0]), *words[1:]]
    presets = [f"{kind}:{name}" for name in spec.presets]
    for parameter, others in spec.replaces.items():
        if any(each.startswith(f"{parameter}=") for each in words):
            words = [*changed_words(others, spec.parameters), *words]
    values = read_values(f"--policy {text}", words, spec.parameters, others=presets)
    return MissChoice(spec=spec, values=values)


EXACT_POLICY = parse_miss_policy("exact")
PRICED_POLICY = parse_miss_policy("priced")
