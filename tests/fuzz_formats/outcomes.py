"""What a checkpoint with one thing wrong may do: be refused with a sentence, or be read right.

Work and memory are counted, not timed.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_tool.errors import MoeToolError
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.stored_formats.logical_checkpoint import LogicalCheckpoint
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from tests.models.stored_formats.test_coded_models import PROMPT
from tests.packed import pack_bundle

MUTATIONS = int(os.environ.get("MUTATIONS", "12"))
"""Of each layout"""
N_TOKENS = 4
MOST_CALLS = 30_000_000
"""Forty times what the untouched checkpoint takes"""
MOST_BYTES = 64 * 2**20
"""Far above the largest tensor of these models, far below an absurd shape's"""


class TooMuch(BaseException):
    """Work or memory beyond what the files call for; no handler takes it for a bad file."""


class _Allocations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            is_held = isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
            if is_held and leaf.untyped_storage().nbytes() > MOST_BYTES:
                raise TooMuch(f"{function} made {list(leaf.shape)}")
        return made


@contextmanager
def counted() -> Iterator[list[int]]:
    """Stop after too many calls, or at a tensor that is too large."""
    calls = [0]

    def count(_frame: FrameType, _event: str, _arg: object) -> None:
        calls[0] += 1
        if calls[0] > MOST_CALLS:
            raise TooMuch(f"{calls[0]} calls")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        with _Allocations():
            yield calls
    finally:
        sys.setprofile(before)


def tokens_of(checkpoint: Path, bundle: Path) -> list[int]:
    report = pack_bundle(LocatedModel(folder=checkpoint, name="x"), out=bundle, bits="native")
    options = run_options(memory="min", context=64, prompt_tokens=32)
    with open_session(report.bundle, options) as session:
        generate = GenerateOptions(max_tokens=N_TOKENS, ignore_eos=True)
        return list(generate_ids(session, [PROMPT], generate).token_ids[0])


def require_refused_or_right(
    folder: Path, bundle: Path, *, same: list[int] | None, said: str
) -> None:
    """Pack and run a checkpoint; `same` are its tokens where they have to stay."""
    try:
        with counted():
            tokens = tokens_of(folder, bundle)
    except MoeToolError as error:
        require_sentence(error)
        return
    assert len(tokens) == N_TOKENS, said
    if same is not None:
        assert tokens == same, said
    require_same_numbers(folder)


def require_sentence(error: MoeToolError) -> None:
    """One printable line and a hint, with the code of a bad input or, with an account below, of too
    little memory; or of a prompt with more tokens than the model has positions."""
    assert error.exit_code in (3, 4) or "no room in a context" in error.message
    line = error.message.splitlines()[0] if error.exit_code == 4 else error.message
    assert line.isprintable() and len(line) < 900, error.message
    assert error.hint and error.hint.isprintable()


def require_same_numbers(folder: Path) -> None:
    """Codes that a bundle keeps stand for the numbers that profiling reads."""
    opened = open_model(LocatedModel(folder=folder, name="x"))
    with opened.checkpoint as checkpoint:
        if not isinstance(checkpoint, LogicalCheckpoint):
            return
        for name, stored in checkpoint.stored.items():
            for row in range(stored.shape[0]) if stored.is_stacked else (None,):
                try:
                    kept = checkpoint.read_kept(name, row=row)
                except MoeToolError as error:  # then experts were packed decoded
                    require_sentence(error)
                    kept = None
                if kept is None:
                    continue
                numbers, read = kept.decode(), checkpoint.read(name, row=row)
                ways = (read, read.T) if stored.is_stacked else (read,)
                assert any(torch.equal(numbers, way) for way in ways), name
