"""Programs run one after the other, each in a process of its own that prints one JSON line."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_tool.errors import BudgetError

_PEAK = re.compile(r"peak memory under limit \S+: (\d+) bytes")
_SIGNAL_BASE = 128
"""A shell's exit code for a program that a signal ended is this plus the signal"""
_SHOWN_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one run."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Of its JSON line; empty where it failed"""
    failure: str | None = None
    """killed, timed out, exit 4, ...; None: it finished"""
    peak_bytes: int | None = None
    """Of a run under a memory limit, page cache included"""

    @property
    def tokens_per_second(self) -> float:
        """Return the rate of a run that finished."""
        return float(self.fields["tokens_per_second"])


def run_program(
    command: Sequence[str | Path],
    *,
    environment: dict[str, str],
    timeout_s: float,
    limit: "MemoryLimit | None" = None,
) -> Outcome:
    """Run a program and return what it printed last, or how it ended.

    Args:
        command: what to run.
        environment: all of it.
        timeout_s: after which it is ended.
        limit: to run under, from an empty page cache.
    """
    words = [str(word) for word in command]
    if limit is not None:
        words = [str(limit.program), str(limit.size_bytes), *words]
    process = subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a timeout ends what the program started, too
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end_group(process)
        return Outcome(failure=f"not done after {timeout_s:.0f} s")
    peak = _PEAK.search(err)
    peak_bytes = int(peak[1]) if peak else None
    code = process.returncode
    if code == 0:
        return Outcome(fields=json.loads(out.strip().splitlines()[-1]), peak_bytes=peak_bytes)
    if code in (-signal.SIGKILL, _SIGNAL_BASE + signal.SIGKILL):
        return Outcome(failure="killed", peak_bytes=peak_bytes)
    if code == BudgetError.exit_code:
        return Outcome(failure="does not fit", peak_bytes=peak_bytes)
    print("\n".join(err.strip().splitlines()[-_SHOWN_LINES:]), file=sys.stderr)
    return Outcome(failure=f"exit {code}", peak_bytes=peak_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """A hard limit on a program's memory."""

    program: Path
    """with_memory_limit"""
    size_bytes: int


def _end_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
