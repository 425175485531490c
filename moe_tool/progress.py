"""How long work tells whoever watches it that it goes on; the library never prints."""

from typing import Protocol


class Progress(Protocol):
    """A listener. Tasks do not nest; `advance` and `end` speak of the last one begun."""

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """Start a task.

        Args:
            task: what is being done, e.g. "layer 3".
            total: how many units it will take; None when that is not known.
            unit: what is counted, in the plural: "tokens", "experts", "bytes".
        """
        ...

    def advance(self, amount: int = 1) -> None:
        """Report `amount` more units as done."""
        ...

    def end(self) -> None:
        """Close the task, whether or not its total was reached."""
        ...

    def note(self, text: str) -> None:
        """Say one sentence that a person should see: a fallback, a choice, a file taken."""
        ...


class _Silent:
    def begin(self, task: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, amount: int = 1) -> None:
        pass

    def end(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass


SILENT: Progress = _Silent()
"""Listens to nothing."""
