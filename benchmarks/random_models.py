"""The same random model for moe-tool and for llama.cpp, made once and used again.

The programs that write the models are somebody else's and are called where they lie, in the folder
that a benchmark is given.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import moe_tool

TOKENIZER = Path(moe_tool.__file__).parent / "demo" / "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Mixtral-shaped model; the defaults have 3.2 GB of experts at 4.5 bits."""

    layers: int = 16
    hidden: int = 2048
    ff: int = 7168
    experts: int = 8
    top_k: int = 2
    vocab: int = 4096

    @property
    def name(self) -> str:
        """Return a name for files."""
        return "-".join(f"{name[0]}{value}" for name, value in asdict(self).items())

    def options(self) -> list[str]:
        """Return what the programs that write models take."""
        return [
            word
            for name, value in asdict(self).items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMaker:
    """Where models are made and kept."""

    shared: Path
    """The folder with make_random_moe.py and make_gguf.py"""
    work: Path

    def bundle(self, shape: ModelShape, *, delete_checkpoint: bool) -> Path:
        """Return the 4-bit bundle of a shape, made from a checkpoint that is deleted where that is
        asked for."""
        bundle = self.work / f"{shape.name}.bundle"
        checkpoint = self.work / f"{shape.name}.checkpoint"
        if not bundle.exists():
            if not (checkpoint / "config.json").exists():  # written last
                self._make("make_random_moe.py", checkpoint, shape, "--tokenizer", str(TOKENIZER))
            pack = ["-m", "moe_tool", "pack", str(checkpoint), "--out", str(bundle)]
            profiles = ["--profiles", str(self.work / "profiles")]
            _run([sys.executable, *pack, "--bits", "4", "--skeleton-bits", "4", *profiles])
        if delete_checkpoint:
            shutil.rmtree(checkpoint, ignore_errors=True)
        return bundle

    def gguf(self, shape: ModelShape) -> Path:
        """Return the Q4_0 GGUF of a shape."""
        path = self.work / f"{shape.name}.gguf"
        if not path.exists():
            part = path.with_suffix(".part")
            self._make("make_gguf.py", part, shape, "--type", "Q4_0")
            os.replace(part, path)
        return path

    def _make(self, program: str, out: Path, shape: ModelShape, *more: str) -> None:
        _run([sys.executable, str(self.shared / program), str(out), *shape.options(), *more])


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each number of a shape."""
    for field in fields(ModelShape):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=field.default)


def shape_of(arguments: argparse.Namespace) -> ModelShape:
    """Return the shape that was asked for."""
    return ModelShape(
        **{field.name: getattr(arguments, field.name) for field in fields(ModelShape)}
    )


def require_programs(shared: Path, names: tuple[str, ...]) -> None:
    """Exit with 2 where a program is not in the folder that was given."""
    for name in names:
        if not (shared / name).is_file():
            exit_with_hint(f"{shared / name} does not exist", "give the folder that holds it")


def exit_with_hint(message: str, hint: str) -> None:
    """Say what is wrong with the command line and exit with 2."""
    print(f"error: {message}\n\nhint: {hint}", file=sys.stderr)
    raise SystemExit(2)


def _run(command: list[str]) -> None:
    print("making:", shlex.join(command), file=sys.stderr)
    # Threads that wait for each other over tensors this small take longer than one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, stdout=sys.stderr, env=environment).returncode:
        print(f"error: {shlex.join(command[1:4])} failed, see above", file=sys.stderr)
        raise SystemExit(3)
