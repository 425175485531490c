"""Tokens that were added to a tokenizer and not to its model: every verb says the same of them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken

from moe_tool.errors import DataSourceError
from moe_tool.evaluation.calibrate import calibrate
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.models.locate import LocatedModel
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import run_prompt
from moe_tool.runtime.run_options import run_options
from moe_tool.text.sources import parse_sources
from moe_tool.tuning.tune_pruning import TunePruningOptions, tune_pruning
from moe_tool.tuning.tune_weights import TuneOptions, tune_weights
from tests.packed import pack_bundle
from tests.tiny_models import VOCABULARY, make_tiny_checkpoint, tiny_tokenizer

WORD = "<tool>"
SENTENCE = f"the tokenizer makes token {VOCABULARY} ({WORD}), the model knows {VOCABULARY}"


class Grown:
    """A model whose tokenizer has one token too many, its bundle, and a text with that token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = LocatedModel(folder=folder / "model", name="grown")
        make_tiny_checkpoint("mixtral", self.model.folder)
        tokenizer = tiny_tokenizer()
        # The 259th id is the one that the model has and the tokenizer does not use.
        tokenizer.add_tokens([AddedToken("<unused>"), AddedToken(WORD)])
        tokenizer.save_pretrained(self.model.folder)
        self.bundle = folder / "bundle"
        pack_bundle(self.model, out=self.bundle, bits="4")
        (folder / "text.txt").write_text(f"{WORD} the quick brown fox. " * 200)
        self.sources = parse_sources([str(folder / "text.txt")])


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return Grown(tmp_path_factory.mktemp("grown"))


def run(grown: Grown, tmp_path: Path, prompt: str = f"a {WORD}") -> Any:
    generation = GenerateOptions(max_tokens=2, raw=True)
    return run_prompt(grown.bundle, prompt, options=run_options(), generation=generation)


def evaluate_bundle(grown: Grown, tmp_path: Path) -> None:
    evaluate(grown.bundle, grown.sources, EvaluateOptions(tokens=256, seq_len=32))


def calibrate_bundle(grown: Grown, tmp_path: Path) -> None:
    options = EvaluateOptions(policy=parse_miss_policy("prune"), tokens=256, seq_len=32)
    calibrate(grown.bundle, grown.sources, options, max_kl=0.1)


def profile(grown: Grown, tmp_path: Path) -> None:
    record_profile(grown.model, grown.sources, out=tmp_path / "p.h5", tokens=256, seq_len=32)


def tune_codes(grown: Grown, tmp_path: Path) -> None:
    options = TuneOptions(steps=1, tokens=256, seq_len=32)
    tune_weights(grown.bundle, grown.model, grown.sources, options, out=tmp_path / "t")


def tune_routers(grown: Grown, tmp_path: Path) -> None:
    tune_pruning(grown.bundle, grown.sources, TunePruningOptions(tokens=256, seq_len=32))


def harness(grown: Grown, tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is an extra")
    from lm_eval.api.instance import Instance

    from moe_tool.evaluation.lm_eval_model import BundleLM

    request = Instance("loglikelihood", {}, (f"a {WORD}", " b"), 0)
    with BundleLM(grown.bundle, run_options()) as model:
        model.loglikelihood([request])


@pytest.mark.parametrize(
    "verb",
    [run, evaluate_bundle, calibrate_bundle, profile, tune_codes, tune_routers, harness],
)
def test_every_verb_names_the_token_and_what_the_model_knows(
    verb: Callable[[Grown, Path], None], grown: Grown, tmp_path: Path
) -> None:
    with pytest.raises(DataSourceError) as caught:
        verb(grown, tmp_path)
    assert caught.value.message == SENTENCE
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_text_without_the_token_is_as_good_as_ever(grown: Grown, tmp_path: Path) -> None:
    assert run(grown, tmp_path, "a plain prompt").prompt.tokens == len("a plain prompt")
