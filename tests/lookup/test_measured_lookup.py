"""Quality and speed of a lookup bundle, against figures worked out without it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_tool.artifacts.bench_report import BenchReport
from moe_tool.artifacts.evaluation_report import EvaluationReport
from moe_tool.benchmarking.bench_lookup import bench_lookup
from moe_tool.benchmarking.bench_plan import BenchOptions
from moe_tool.budget.request import AUTO, parse_memory
from moe_tool.cli.app import run_command
from moe_tool.errors import BudgetError, CorruptArtifactError, WrongModelError
from moe_tool.evaluation.evaluate import EvaluateOptions
from moe_tool.evaluation.evaluate_lookup import evaluate_lookup
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.lookup.disk_rows import load_model
from moe_tool.lookup.pack_lookup import pack_lookup
from moe_tool.models.locate import LocatedModel
from moe_tool.models.mole.modeling import MoleForCausalLM
from moe_tool.quantization.row_codes import RowCodes
from moe_tool.store.throttle import ThrottledDisk, parse_throttle
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources
from tests.lookup.tiny_mole import make_mole, tiny_mole
from tests.tiny_models import VOCABULARY, make_tiny_checkpoint, tiny_tokenizer

ROW_BYTES = {"native": 1920, "8": 480 + 4 * 8, "nf4": 240 + 4 * 8}
SOURCES = parse_sources(["builtin:eval"])
OPTIONS = EvaluateOptions(tokens=160, seq_len=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocatedModel:
    folder = make_mole(tmp_path_factory.mktemp("mole") / "model")
    return LocatedModel(folder=folder, name="tiny")


@pytest.fixture(scope="module")
def bundles(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for bits in ROW_BYTES:
        pack_lookup(model, bits=bits, out=folder / bits)
    return {bits: folder / bits for bits in ROW_BYTES}


def text() -> tuple[torch.Tensor, np.ndarray]:
    found = build_sequences(
        SOURCES, tiny_tokenizer(), vocabulary=VOCABULARY, n_tokens=160, seq_len=40, holdout=0.0,
        seed=0,
    )  # fmt: skip
    return torch.from_numpy(found.ids.astype(np.int64)), found.domain


def log_probabilities(model: MoleForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits.double().log_softmax(-1)[:, 1:-1]


def evaluated(bundle: Path, reference: LocatedModel | None = None) -> EvaluationReport:
    return evaluate_lookup(bundle, SOURCES, OPTIONS, reference=reference)


@pytest.mark.parametrize("bits", ROW_BYTES)
def test_figures_are_those_of_two_plain_forwards(
    bits: str, bundles: dict[str, Path], model: LocatedModel
) -> None:
    report = evaluated(bundles[bits], model)
    figures, (ids, domain) = report.figures, text()
    theirs = log_probabilities(tiny_mole(), ids)
    opened, table = load_model(LookupBundle.open(bundles[bits]))
    ours = log_probabilities(opened, ids)
    table.rows.close()
    kl = (theirs.exp() * (theirs - ours)).sum(-1)  # [N, S - 2]
    nll = -ours.gather(-1, ids[:, 2:, None])[..., 0]
    assert figures.tokens == 4 * 38 and report.sequences == 4
    assert figures.kl_source_mean is not None and figures.perplexity_source is not None
    assert figures.kl_source_mean.value == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-9)
    assert figures.perplexity.value == pytest.approx(float(nll.mean().exp()), rel=1e-6)
    nll = -theirs.gather(-1, ids[:, 2:, None])[..., 0]
    assert figures.perplexity_source.value == pytest.approx(float(nll.mean().exp()), rel=1e-6)
    for index, figure in enumerate(report.domains.values()):
        assert figure.kl_source_mean is not None
        wanted = float(kl[torch.from_numpy(domain == index)].mean())
        assert figure.kl_source_mean.value == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    assert figures.bytes_read_per_token.value == ROW_BYTES[bits]
    assert figures.hit_rate.value == 0 and figures.expected_kl is None


def test_fewer_bits_are_further_away(bundles: dict[str, Path], model: LocatedModel) -> None:
    found = [evaluated(bundles[bits], model).figures.kl_source_mean for bits in ROW_BYTES]
    native, eight, four = (each.value for each in found if each is not None)
    assert native < 1e-9 < eight < four / 10


def test_without_a_reference_there_is_perplexity_alone(bundles: dict[str, Path]) -> None:
    figures = evaluated(bundles["8"]).figures
    assert figures.kl_source_mean is None and figures.perplexity.value > 1


def test_another_model_and_too_little_memory_are_refused(
    bundles: dict[str, Path], model: LocatedModel, tmp_path: Path
) -> None:
    other = LocatedModel(folder=make_mole(tmp_path / "other", seed=1), name="other")
    with pytest.raises(WrongModelError):
        evaluated(bundles["8"], other)
    with pytest.raises(WrongModelError, match="a table already"):
        evaluated(bundles["8"], LocatedModel(folder=bundles["8"], name="bundle"))
    moe = LocatedModel(folder=make_tiny_checkpoint("mixtral", tmp_path / "moe"), name="moe")
    with pytest.raises(WrongModelError, match="no mixture of lookup experts"):
        evaluated(bundles["8"], moe)
    small = EvaluateOptions(tokens=160, seq_len=40, memory=parse_memory("1MiB"))
    with pytest.raises(BudgetError, match="the checkpoint"):
        evaluate_lookup(bundles["8"], SOURCES, small, reference=model)


def test_logits_that_are_no_numbers_are_refused(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowCodes, "decode", lambda _, raw: torch.full((len(raw), 480), torch.inf))
    with pytest.raises(CorruptArtifactError, match="not finite"):
        evaluated(bundles["8"])


def benched(bundle: Path, **options: object) -> BenchReport:
    fields = {"prompt_tokens": (12,), "generate": (5,), "repetitions": 2, "memory": (AUTO,)}
    return bench_lookup(bundle, BenchOptions(**(fields | options)))  # type: ignore[arg-type]


def test_rows_of_a_bench_count_what_is_read(bundles: dict[str, Path]) -> None:
    prompt, decode = benched(bundles["nf4"], depth=(3,), threads=(1,)).rows
    assert (prompt.test, decode.test) == ("pp12 @ d3", "tg5 @ d3")
    assert decode.timed.tokens == decode.timed.misses == decode.timed.forwards == 10
    assert decode.timed.bytes_read_per_token == ROW_BYTES["nf4"]
    # Of a prompt each distinct token is read once.
    assert prompt.timed.forwards == 2 and 2 <= prompt.timed.misses <= 24
    assert prompt.timed.bytes_read == prompt.timed.misses * ROW_BYTES["nf4"]
    for row in (prompt, decode):
        assert row.bundle.bits == "nf4" and row.setup.threads == 1
        assert row.timed.hit_rate == 0 < row.stall_share < 1
        assert all(rate > 0 for rate in row.tokens_per_second_all)
        shared = sum(p.numel() for n, p in tiny_mole().named_parameters() if "expert" not in n)
        assert row.bundle.params == VOCABULARY * 480 + shared


def test_a_throttled_bench_waits_for_every_byte(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    monkeypatch.setattr(ThrottledDisk, "wait", lambda _, n, **__: passed.append(n))
    report = benched(bundles["8"], throttle=parse_throttle("1MB/s"), cache="cold")
    assert sum(passed) >= sum(row.timed.bytes_read for row in report.rows) > 0


def test_the_command_line_measures(
    bundles: dict[str, Path], model: LocatedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(bundles["nf4"])
    evaluate = ["evaluate", bundle, "--data", "builtin:eval", "--tokens", "160", "--seq-len", "40"]
    assert run_command([*evaluate, "--reference", str(model.folder), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["bytes_read_per_token"] == ROW_BYTES["nf4"] and found["kl_source_mean"] > 0
    assert found["perplexity_ci95"][0] < found["perplexity"] < found["perplexity_ci95"][1]
    assert "152 predictions, rows on disk" in printed.err
    assert run_command([*evaluate, "--policy", "drop"]) == 2
    assert "--policy: the experts of a lookup bundle are rows" in capsys.readouterr().err
    bench = ["bench", bundle, "--prompt-tokens", "0", "--generate", "4", "--repetitions", "1"]
    assert run_command([*bench, "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["bytes_read_per_token"] == ROW_BYTES["nf4"] and row["tokens_per_second"] > 0
    assert run_command([*bench, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["test"] == "tg4"
    assert run_command([*bench, "--prefetch", "next-layer"]) == 2
    assert run_command([*bench, "--generate", "9999"]) == 2
