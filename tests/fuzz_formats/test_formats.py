"""Quantized checkpoints with one thing wrong: refused with a sentence and a hint, or read right.

`make fuzz-formats` tries MUTATIONS of every layout, otherwise a dozen of one layout a format are
tried. Where a mutation touches nothing that weights depend on, tokens have to stay; where it does,
codes that are kept and codes that are decoded have to stand for the same numbers, and the run has
to end with tokens, see outcomes.py.
"""

import copy
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fuzz_formats.layouts import FIRST, LAYOUTS
from tests.fuzz_formats.mutations import KINDS, Contents, mutate
from tests.fuzz_formats.outcomes import MUTATIONS, require_refused_or_right, tokens_of
from tests.models.stored_formats.test_coded_models import write_model

TRIED = list(LAYOUTS) if "MUTATIONS" in os.environ else [name for name in LAYOUTS if name in FIRST]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Untouched checkpoint, and the tokens that it gives."""

    name: str
    folder: Path
    contents: Contents
    tokens: list[int]


@pytest.fixture(scope="module", params=TRIED)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("layout")
    coded, _ = write_model(LAYOUTS[request.param], folder)
    return Base(
        name=request.param,
        folder=coded,
        contents=Contents.read(coded),
        tokens=tokens_of(coded, folder / "b"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(MUTATIONS))
def test_a_mutation_is_refused_or_read_right(base: Base, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{base.name} {seed}")
    kind = list(KINDS)[(seed + 7 * list(LAYOUTS).index(base.name)) % len(KINDS)]
    folder = tmp_path / "checkpoint"
    shutil.copytree(base.folder, folder)
    said = mutate(copy.deepcopy(base.contents), kind, rng, folder)
    same = base.tokens if KINDS[kind][1] == "form" else None
    require_refused_or_right(folder, tmp_path / "bundle", same=same, said=said)
