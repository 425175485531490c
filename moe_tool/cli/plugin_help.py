"""Lists of plug-ins below a command's options, read from the registries when help is printed."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from moe_tool.policies.misses import PolicySpec
    from moe_tool.policies.parameters import Parameter

_BELOW = "listed below"


class PluginVerb(TyperCommand):
    """A command whose options' help may contain keys of PLUGIN_LISTS."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all options, then the plug-ins that their help refers to."""
        used = {}
        for option in self.params:
            text = getattr(option, "help", None) or ""
            for key in PLUGIN_LISTS:
                if key in text:
                    used[key] = option.opts[0]
                    option.help = text.replace(key, _BELOW)  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)
        for key, name in used.items():
            with formatter.section(name):
                formatter.write_dl(PLUGIN_LISTS[key]())


def _evictions() -> list[tuple[str, str]]:
    from moe_tool.policies.eviction import EVICTION

    return [(s.name, s.summary + _defaults(s.parameters)) for s in EVICTION.values()]


def _miss_policies() -> list[tuple[str, str]]:
    from moe_tool.policies.misses import MISS_POLICIES

    rows = []
    for spec in MISS_POLICIES.values():
        rows += [(spec.name, spec.summary + _defaults(spec.parameters)), *_presets(spec)]
    return rows


def _searched() -> list[tuple[str, str]]:
    from moe_tool.policies.misses import MISS_POLICIES

    rows = []
    for spec in MISS_POLICIES.values():
        if spec.strength is not None:
            searched = spec.strength.parameter
            rows.append((spec.name, f"{searched}: {spec.parameters[searched].help}"))
            rows += _presets(spec)
    return rows


def _presets(spec: "PolicySpec") -> list[tuple[str, str]]:
    return [
        (f"{spec.name}:{preset}", f"as {spec.name}, with {', '.join(spec.preset_words(preset))}")
        for preset in spec.presets
    ]


def _quantizers() -> list[tuple[str, str]]:
    from moe_tool.quantizers.registry import QUANTIZERS

    return [
        (s.name, s.summary + " [needs a profile]" * s.needs_inputs) for s in QUANTIZERS.values()
    ]


def _defaults(parameters: "Mapping[str, Parameter]") -> str:
    from moe_tool.policies.parameters import number_text

    given = ", ".join(f"{name}={number_text(each.default)}" for name, each in parameters.items())
    return f" [{given}]" if given else ""


PLUGIN_LISTS: Mapping[str, Callable[[], list[tuple[str, str]]]] = {
    "{evictions}": _evictions,
    "{miss policies}": _miss_policies,
    "{searched policies}": _searched,
    "{quantizers}": _quantizers,
}
"""Placeholder in an option's help -> rows of name and summary"""
