"""A bundle answers lm_eval as the ordinary model does, and a lossy policy shows in the answers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from moe_tool.budget.request import parse_memory
from moe_tool.demo import demo_model_path
from moe_tool.errors import DataSourceError, UsageError
from moe_tool.evaluation.lm_eval_model import BundleLM
from moe_tool.models.locate import LocatedModel
from moe_tool.runtime.run_options import run_options
from tests.packed import pack_bundle

pytestmark = pytest.mark.slow

TOKENIZER = AutoTokenizer.from_pretrained(demo_model_path())
QUESTION = "Return the list of all the items in the"
PAIRS = [
    (QUESTION, " dictionary, which is a new one."),
    (QUESTION, " file"),
    ("def f(x):\n    return ", "x + 1\n"),
    (QUESTION, " list of words that are the same"),
    ("", "The list of items"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("harness") / "bundle"
    pack_bundle(LocatedModel(folder=demo_model_path(), name="demo"), out=out, bits="native")
    return out


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    with torch.inference_mode():
        yield AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)


def open_model(bundle: Path, policy: str = "exact", **options: object) -> BundleLM:
    decode_context = bool(options.pop("decode_context", False))
    run = {"memory": parse_memory("50%"), "gates": False, "context": 128, **options}
    return BundleLM(
        bundle,
        run_options(policy=policy, **run),  # type: ignore[arg-type]
        decode_context=decode_context,
    )


def ask(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=index)
        for index, each in enumerate(arguments)
    ]


def by_hand(model: torch.nn.Module, ids: list[int], n_answer: int) -> tuple[float, bool]:
    """One wide forward of the ordinary model: log-likelihood of the last tokens."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1 - n_answer : -1].double()
    answer = torch.tensor(ids[-n_answer:])
    picked = torch.log_softmax(logits, dim=-1).gather(1, answer[:, None])
    return picked.sum().item(), bool((logits.argmax(dim=-1) == answer).all())


def encode(context: str, answer: str) -> tuple[list[int], int]:
    """Ids of both together, beginning with the first token, and how many are the answer's."""
    whole = TOKENIZER(context + answer).input_ids
    rest = len(context) - len(context.rstrip())  # lm_eval scores trailing spaces with the answer
    context = context[: len(context) - rest]
    return whole, len(whole) - len(TOKENIZER(context).input_ids)


def test_under_exact_log_likelihoods_are_those_of_the_ordinary_model(
    bundle: Path, model: torch.nn.Module
) -> None:
    with open_model(bundle) as lm:
        scored = lm.loglikelihood(ask("loglikelihood", *PAIRS))
        for (context, answer), (value, is_greedy) in zip(PAIRS, scored, strict=True):
            expected, expected_greedy = by_hand(model, *encode(context, answer))
            assert value == pytest.approx(expected, abs=2e-3), (context, answer)  # float32 sums
            assert is_greedy == expected_greedy
        assert lm.stats.decode.hits > 0 and lm.stats.decode.misses > 0
        # Each answer token but the last is fed in a forward of its own.
        n_fed = sum(encode(*pair)[1] - 1 for pair in PAIRS)
        assert lm.stats.decode.tokens == lm.stats.decode.forwards == n_fed


@pytest.mark.parametrize("arch", ["gpt_oss", "deepseek_v3", "qwen3_moe"])
def test_every_kind_of_kv_cache_gives_the_ordinary_answers(
    arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of windows and latent vectors too: answers to one question share what is read of it."""
    folder = tiny_checkpoint(arch)
    pack_bundle(LocatedModel(folder=folder, name=arch), out=tmp_path / "bundle", bits="native")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = "the items of the list are words. " * 2
    pairs = [(question, "a word"), (question, "an item of it"), (question, "no")]
    with open_model(tmp_path / "bundle") as lm:
        ids = lm.tok_encode(question.rstrip())
        for (_, answer), (value, _) in zip(
            pairs, lm.loglikelihood(ask("loglikelihood", *pairs)), strict=True
        ):
            whole = lm.tok_encode(question + answer)
            expected, _ = by_hand(model, whole, len(whole) - len(ids))
            assert value == pytest.approx(expected, abs=2e-3)


def test_an_answer_that_the_model_would_give_is_greedy(bundle: Path) -> None:
    until = {"until": ["\n"], "max_gen_toks": 12}
    with open_model(bundle) as lm:
        (text,) = lm.generate_until(ask("generate_until", (QUESTION, until)))
        assert text
        ((_, is_greedy),) = lm.loglikelihood(ask("loglikelihood", (QUESTION, text)))
        assert is_greedy


def test_a_context_that_is_too_long_loses_its_beginning(
    bundle: Path, model: torch.nn.Module
) -> None:
    context = "The items of the list are words. " * 20
    ids, n_answer = encode(context, " The list")
    with open_model(bundle, context=32) as lm:
        ((value, _),) = lm.loglikelihood(ask("loglikelihood", (context, " The list")))
        assert value == pytest.approx(by_hand(model, ids[-33:], n_answer)[0], abs=2e-3)
        assert lm.n_cut_contexts == 1
        with pytest.raises(DataSourceError, match="context of 32"):
            lm.loglikelihood(ask("loglikelihood", ("The", context)))


def test_a_rolling_log_likelihood_predicts_every_token_once(
    bundle: Path, model: torch.nn.Module
) -> None:
    text = "The items of the list are words, and the words are items of the list. " * 2
    ids = TOKENIZER(text).input_ids
    assert 32 < len(ids) < 64
    first = by_hand(model, [0, *ids[:32]], 32)[0]
    rest = by_hand(model, ids[-33:], len(ids) - 32)[0]
    with open_model(bundle, context=32) as lm:
        (value,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    assert value == pytest.approx(first + rest, abs=5e-3)


@pytest.mark.parametrize("residency", ["frozen", "cache"])
def test_a_lossy_policy_changes_answers_and_is_counted(bundle: Path, residency: str) -> None:
    with open_model(bundle) as lm:
        exact = lm.loglikelihood(ask("loglikelihood", *PAIRS))
    with open_model(bundle, "random", residency=residency) as lm:
        lossy = lm.loglikelihood(ask("loglikelihood", *PAIRS))
        assert lm.stats.decode.substitutions > 0
        assert lm.stats.prompt.substitutions == lm.stats.decode.drops == 0
        # The order of requests, and so whether a context is read anew, changes nothing.
        again = lm.loglikelihood(ask("loglikelihood", *reversed(PAIRS)))
    assert again[::-1] == lossy
    differs = [a[0] != pytest.approx(b[0], abs=2e-3) for a, b in zip(exact, lossy, strict=True)]
    is_long = [encode(*pair)[1] > 1 for pair in PAIRS]
    assert differs == is_long  # one token is predicted by the exact context


def test_decoding_the_context_puts_the_policy_into_it(bundle: Path) -> None:
    request = ask("loglikelihood", (QUESTION, " file"))
    with open_model(bundle, "random") as lm:
        ((exact, _),) = lm.loglikelihood(request)
        assert lm.stats.decode.tokens == 0
    with open_model(bundle, "random", decode_context=True) as lm:
        ((lossy, _),) = lm.loglikelihood(request)
        n_context = len(TOKENIZER(QUESTION).input_ids)
        assert (lm.stats.prompt.tokens, lm.stats.decode.tokens) == (1, n_context - 1)
        assert lm.stats.decode.substitutions > 0
    with open_model(bundle, decode_context=True) as lm:
        ((stepwise, _),) = lm.loglikelihood(request)
    assert stepwise == pytest.approx(exact, abs=2e-3)
    assert lossy != pytest.approx(exact, abs=2e-3)


def test_generated_text_is_the_ordinary_models_up_to_the_stop(
    bundle: Path, model: torch.nn.Module
) -> None:
    ids = torch.tensor([TOKENIZER(QUESTION).input_ids])
    made = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    expected = TOKENIZER.decode(made, skip_special_tokens=True)
    word = expected.split()[2]
    arguments = {"until": [], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    with open_model(bundle) as lm:
        whole, cut = lm.generate_until(
            ask("generate_until", (QUESTION, arguments), (QUESTION, {**arguments, "until": word}))
        )
        assert whole == expected
        assert cut == expected.split(word)[0]
        n_generated = len(made) - 1  # the last is not fed
        assert n_generated < lm.stats.decode.tokens < 2 * n_generated  # the second stopped early


def test_sampling_is_followed_and_reproducible(bundle: Path) -> None:
    arguments = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    requests = ask("generate_until", *[(QUESTION, arguments)] * 2)
    with open_model(bundle) as lm:
        first, second = lm.generate_until(requests)
        assert first != second
        assert lm.generate_until(requests) == [first, second]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9}, "top_p"),
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 128}, "no room in a context of 128"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    bundle: Path, arguments: dict[str, object], words: str
) -> None:
    with open_model(bundle) as lm, pytest.raises(UsageError, match=words):
        lm.generate_until(ask("generate_until", (QUESTION, {"until": ["\n"], **arguments})))
