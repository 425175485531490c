"""Commands as a user types them, each in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def fields(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        lines = self.stdout.splitlines()
        assert len(lines) == 1, f"more than one object on stdout:\n{self.stdout}\n{self.stderr}"
        found = json.loads(lines[0])
        assert isinstance(found, dict)
        return found


def moe_tool(*arguments: str | Path, folder: Path, stdin: str = "", **environment: str) -> Done:
    """Run a command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "moe_tool", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment},
        input=stdin,
        capture_output=True,
        text=True,
    )
    return Done(code=done.returncode, stdout=done.stdout, stderr=done.stderr)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What each verb answered, in the order in which they ran."""

    folder: Path
    """The working folder: profiles/ and bundle/ are in it"""
    model: Path
    profile: Done
    buddies: Done
    pack: Done
    run: Done
    evaluate: Done
