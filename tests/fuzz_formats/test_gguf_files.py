"""GGUF files with one thing wrong: refused with a sentence and a hint, or read right."""

import copy
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fuzz_formats.gguf_mutations import FILE, GGUF_KINDS, GgufContents, mutate_gguf
from tests.fuzz_formats.outcomes import MUTATIONS, require_refused_or_right, tokens_of
from tests.models.stored_formats.converted_gguf import converted_model, tiny_wide

KINDS = {
    "q8_0": ("Q8_0",), "q4_0": ("Q4_0",), "q4_k": ("Q4_K",), "q6_k": ("Q6_K",),
    "mxfp4": ("MXFP4",), "q4_k_m": ("Q4_K", "Q6_K"),
}  # fmt: skip
"""Types of the matrices of experts, in turns"""
TRIED = list(KINDS) if "MUTATIONS" in os.environ else ["q8_0", "q4_k_m"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufBase:
    """Untouched folder, and the tokens that it gives."""

    name: str
    folder: Path
    contents: GgufContents
    tokens: list[int]


@pytest.fixture(scope="module", params=TRIED)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GgufBase:
    folder = tmp_path_factory.mktemp("layout")
    kinds = KINDS[request.param]
    made = converted_model("qwen3_moe", folder, kinds=kinds, configure=tiny_wide)
    contents = GgufContents.of(made.config, made.metadata, made.tensors)
    for path in made.coded.glob("*.gguf"):
        path.unlink()
    contents.write(made.coded)
    return GgufBase(
        name=request.param,
        folder=made.coded,
        contents=contents,
        tokens=tokens_of(made.coded, folder / "b"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(MUTATIONS))
def test_a_mutation_is_refused_or_read_right(base: GgufBase, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"gguf {base.name} {seed}")
    kind = list(GGUF_KINDS)[(seed + 5 * list(KINDS).index(base.name)) % len(GGUF_KINDS)]
    folder = tmp_path / "checkpoint"
    shutil.copytree(base.folder, folder, ignore=shutil.ignore_patterns(FILE))
    said = mutate_gguf(copy.deepcopy(base.contents), kind, rng, folder)
    same = base.tokens if GGUF_KINDS[kind][1] == "form" else None
    require_refused_or_right(folder, tmp_path / "bundle", same=same, said=said)
