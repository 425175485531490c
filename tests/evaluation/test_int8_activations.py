"""The price of int8 activations: exact answers with float32 ones are what KL is measured from."""

from pathlib import Path

import pytest

from moe_tool.budget.request import parse_memory
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.models.locate import LocatedModel
from moe_tool.native.kernels import are_tokens_int8
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.runtime.activations import Activations
from moe_tool.text.sources import TextSource, parse_sources
from tests.models.stored_formats.test_coded_models import write_pair
from tests.packed import pack_bundle
from tests.packing.test_kept_pack import Notes

SEQ_LEN = 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4")
    coded, _ = write_pair("int4", folder)
    model = LocatedModel(folder=coded, name="int4")
    return pack_bundle(model, out=folder / "b", bits="native").bundle


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextSource, ...]:
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return parse_sources([f"letters={text}"])


def options(activations: Activations, **fields: object) -> EvaluateOptions:
    settings = {"tokens": 4 * SEQ_LEN, "seq_len": SEQ_LEN, "memory": parse_memory("50%")}
    return EvaluateOptions(**{**settings, **fields}, activations=activations)  # type: ignore[arg-type]


@pytest.mark.parametrize("residency", ["cache", "frozen"])
def test_int8_has_a_price_and_float32_none(
    bundle: Path, sources: tuple[TextSource, ...], residency: str
) -> None:
    notes = {"float32": Notes(), "int8": Notes()}
    found = {
        kind: evaluate(bundle, sources, options(kind, residency=residency), progress=told)  # type: ignore[arg-type]
        for kind, told in notes.items()
    }
    plain, rounded = found["float32"].figures, found["int8"].figures
    assert plain.kl_mean.value == plain.kl_p99.value == 0.0
    assert 1e-7 < rounded.kl_mean.value < 0.1
    assert rounded.perplexity.value != plain.perplexity.value
    assert rounded.perplexity_exact.value == plain.perplexity.value
    assert rounded.hit_rate.value == pytest.approx(plain.hit_rate.value, abs=0.1)
    assert found["int8"].setup.activations == "int8"
    for kind, told in notes.items():
        assert any("compared with" in line for line in told.lines) == (kind == "int8")
    assert not are_tokens_int8()


def test_controls_are_rounded_too(bundle: Path, sources: tuple[TextSource, ...]) -> None:
    drop = parse_miss_policy("drop")
    reports = [
        evaluate(bundle, sources, options(kind, policy=drop, controls=True, gates=False))
        for kind in ("float32", "int8")
    ]
    plain, rounded = ({row.policy: row.figures for row in each.rows} for each in reports)
    assert list(plain) == list(rounded)
    assert plain["exact"].kl_mean.value == 0.0 < rounded["exact"].kl_mean.value
    assert rounded["exact"].kl_mean.value < rounded["drop"].kl_mean.value
    assert rounded["exact"].bytes_read_per_token.value > 0
