"""Interface through which long work reports its progress; the library never prints."""


class Progress:
    """A listener that ignores everything; its subclasses show it.

    Tasks do not nest; `advance` and `end` refer to the last one begun.
    """

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """Start a task.

        Args:
            task: what is being done, e.g. "layer 3".
            total: number of units; None if unknown.
            unit: plural noun: "tokens", "experts", "bytes".
        """

    def advance(self, amount: int = 1) -> None:
        """Report `amount` more units as done."""

    def end(self) -> None:
        """Close the task, whether or not its total was reached."""

    def note(self, text: str) -> None:
        """Show one sentence to the user: a fallback, a choice, the file in use."""


SILENT = Progress()
