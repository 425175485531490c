"""Commands as a user types them, each in a process of its own."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

_LIBRARIES = (
    "torch",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.auto.tokenization_auto",
    "datasets",
    "h5py",
    "sklearn.cluster",
    "moe_tool.evaluation.evaluate",
    "moe_tool.profiling.recorder",
)
"""Imported once, by the process that the others are forked from: they take seconds"""
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "100000", "COLUMNS": "100"}
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload([*_LIBRARIES])


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


def moe_tool(*arguments: str | Path, folder: Path, stdin: str = "") -> Done:
    """Run a command line in a process of its own."""
    environment = {**os.environ, **_ENVIRONMENT}
    with mock.patch.dict(os.environ, environment):
        multiprocessing.forkserver.ensure_running()
    with TemporaryDirectory() as streams:
        files = [Path(streams) / name for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(stdin)
        process = _forking.Process(
            target=_command, args=([*map(str, arguments)], str(folder), environment, files)
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return Done(code=process.exitcode, stdout=files[1].read_text(), stderr=files[2].read_text())


def _command(
    arguments: list[str], folder: str, environment: Mapping[str, str], files: Sequence[Path]
) -> None:
    """Become `moe-tool` with these arguments."""
    for number, (path, mode) in enumerate(zip(files, ("r", "w", "w"), strict=True)):
        stream = path.open(mode)
        os.dup2(stream.fileno(), number)
        setattr(sys, path.name, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["moe-tool", *arguments]
    from moe_tool.cli.app import main

    main()


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
