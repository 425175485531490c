"""Output of a command: results on stdout, the rest on stderr, bars only on a terminal."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

from moe_tool.artifacts.json_fields import json_fields
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

_LINE_EVERY_S = 30.0
_PIPED_WIDTH = 160
"""Width in characters of tables written to a file or a pipe"""


class Output:
    """Result and message streams of one command, and its clock."""

    def __init__(self, *, as_json: bool, data: TextIO, people: TextIO) -> None:
        """Write results to `data` (only one JSON object if `as_json`) and messages to `people`."""
        self.as_json = as_json
        self.progress: Progress = _Bars(people) if people.isatty() else _Lines(people)
        self._data = data
        self._people = people
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time since the command began."""
        return time.perf_counter() - self._start

    def show(self, *what: "RenderableType") -> None:
        """Print a readable result on stdout, or with JSON on stderr."""
        _console(self._people if self.as_json else self._data).print(
            *what, sep="\n", soft_wrap=True
        )

    def say(self, text: str) -> None:
        """Print one line about the work on stderr."""
        print(text, file=self._people, flush=True)

    def stream(self, text: str) -> None:
        """Print a piece of generated text on stdout; with JSON do nothing."""
        if not self.as_json:
            self._data.write(text)
            self._data.flush()

    def result(self, found: object) -> None:
        """Print a report or a mapping as the JSON object, with defaults for `seconds` and
        `peak_rss_bytes`; without JSON do nothing."""
        if not self.as_json:
            return
        measured = {"seconds": self.seconds, "peak_rss_bytes": peak_rss_bytes()}
        write_json(measured | json_fields(found), self._data)


@contextmanager
def open_output(*, as_json: bool) -> Iterator[Output]:
    """Yield the output; with JSON, redirect prints of libraries from stdout to stderr."""
    output = Output(as_json=as_json, data=sys.stdout, people=sys.stderr)
    if not as_json:
        yield output
        return
    with redirect_stdout(sys.stderr):
        yield output


def write_json(fields: Mapping[str, object], stream: TextIO) -> None:
    """Write one JSON object on one line, non-finite numbers as null."""
    stream.write(json.dumps(json_fields(fields), ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


class _Bars(Progress):
    """Progress on a terminal: one bar with the time left, removed when the task ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: RichBars | None = None
        self._task: TaskID | None = None

    def begin(self, task: str, total: int | None, unit: str) -> None:
        from rich import progress as bars

        self.end()
        amounts = (
            [bars.DownloadColumn(binary_units=True)]
            if unit == "bytes"
            else [bars.MofNCompleteColumn(), bars.TextColumn(unit)]
        )
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            *amounts,
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            console=_console(self._stream),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bars.add_task(task, total=total)
        self._bars.start()

    def advance(self, amount: int = 1) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, amount)

    def end(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None

    def note(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


class _Lines(Progress):
    """Progress in a log: a plain line at most every 30 s."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._task = ""
        self._unit = ""
        self._total: int | None = None
        self._done = 0
        self._start = self._said = time.monotonic()

    def begin(self, task: str, total: int | None, unit: str) -> None:
        self._task, self._total, self._unit, self._done = task, total, unit, 0
        self._start = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said < _LINE_EVERY_S:
            return
        self._said = now
        of = "" if self._total is None else f" of {self._total}"
        left = ""
        if self._total and self._done:
            left_s = (now - self._start) * (self._total - self._done) / self._done
            left = f", about {left_s:.0f} s left"
        self.note(f"{self._task}: {self._done}{of} {self._unit}{left}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
