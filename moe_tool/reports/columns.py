"""Empty tables: words on the left, numbers on the right."""

from collections.abc import Collection

from rich import box
from rich.table import Table


def columns(
    *headings: str, words: Collection[int] = (0,), title: str | None = None, ruled: bool = True
) -> Table:
    """Return a table without rows.

    Args:
        words: positions of left-aligned columns; the others hold numbers.
        title: text above the table.
        ruled: whether a line separates the headings; otherwise they are bold.
    """
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD if ruled else None,
        pad_edge=False,
        header_style=None if ruled else "bold",
    )
    for position, heading in enumerate(headings):
        table.add_column(
            heading, justify="left" if position in words else "right", no_wrap=not ruled
        )
    return table
