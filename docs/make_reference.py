"""Writes docs/reference.md from --help, and tables of plug-ins from their specs: `make docs`.

Tables lie between the lines `<!-- generated: NAME -->` and `<!-- end -->` of pages that are written
by hand. A test notices what is stale.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import typer

from moe_tool.cli.app import app
from moe_tool.policies.eviction import EVICTION
from moe_tool.policies.misses import MISS_POLICIES
from moe_tool.policies.parameters import Parameter, number_text
from moe_tool.quantizers.registry import QUANTIZERS

DOCS = Path(__file__).parent
_COLUMNS = 100
_HEAD = """# Reference

What `moe-tool --help` and `moe-tool VERB --help` print. This page is generated: `make docs`.
"""
_TABLE = re.compile(r"(<!-- generated: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return every page that is generated, whole or in part, as it should be."""
    found = {DOCS / "reference.md": reference_page()}
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if path not in found and _TABLE.search(text):
            found[path] = _TABLE.sub(lambda at: at[1] + TABLES[at[2]]() + at[3], text)
    return found


def reference_page() -> str:
    """Return the whole page."""
    wide = {"terminal_width": _COLUMNS, "resilient_parsing": True}
    group = typer.main.get_command(app)
    root = group.make_context("moe-tool", ["inspect"], **wide)
    parts = [_HEAD, _section("moe-tool", group.get_help(root))]
    for name, command in group.commands.items():
        context = command.make_context(name, [], parent=root, **wide)
        parts.append(_section(f"moe-tool {name}", command.get_help(context)))
        for inner, verb in getattr(command, "commands", {}).items():
            context_of_verb = verb.make_context(inner, [], parent=context, **wide)
            title = f"moe-tool {name} {inner}"
            parts.append(_section(title, verb.get_help(context_of_verb)))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


def _evictions() -> str:
    rows = [(f"`{s.name}`", s.summary, s.source) for s in EVICTION.values()]
    return _markdown(("name", "leaves first", "source"), rows)


def _miss_policies() -> str:
    rows = [
        (
            f"`{s.name}`" + ("" if s.is_lossy else " (default)"),
            s.summary,
            "yes" if s.is_lossy else "no",
            s.source,
        )
        for s in MISS_POLICIES.values()
    ]
    return _markdown(("`--policy`", "a missing expert is answered by", "lossy", "source"), rows)


def _parameters(specs: Mapping[str, Mapping[str, Parameter]]) -> str:
    users: dict[tuple[str, Parameter], list[str]] = {}
    for policy, parameters in specs.items():
        for name, each in parameters.items():
            users.setdefault((name, each), []).append(f"`{policy}`")
    rows = [
        (", ".join(policies), f"`{name}`", number_text(each.default), each.bounds, each.help)
        for (name, each), policies in users.items()
    ]
    return _markdown(("policy", "parameter", "default", "possible", "meaning"), rows)


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _quantizers() -> str:
    rows = [
        (
            f"`{s.name}`",
            "what experts are given on the profile's tokens" if s.needs_inputs else "the weights",
            s.summary,
            s.source,
        )
        for s in QUANTIZERS.values()
    ]
    return _markdown(("`--quantizer`", "goes by", "rounds", "source"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "eviction policies": _evictions,
    "eviction parameters": lambda: _parameters({k: s.parameters for k, s in EVICTION.items()}),
    "quantizers": _quantizers,
    "miss policies": _miss_policies,
    "miss parameters": lambda: _parameters({k: s.parameters for k, s in MISS_POLICIES.items()}),
}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page}")
