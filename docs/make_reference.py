"""Writes docs/reference.md from what `--help` prints: `make docs`. A test notices a stale page."""

from pathlib import Path

import typer

from moe_tool.cli.app import app

PAGE = Path(__file__).with_name("reference.md")
_COLUMNS = 100
_HEAD = """# Reference

What `moe-tool --help` and `moe-tool VERB --help` print. This page is generated: `make docs`.
"""


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


if __name__ == "__main__":
    PAGE.write_text(reference_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
