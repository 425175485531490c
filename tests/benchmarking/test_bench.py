"""`bench` on the embedded model: rows, figures that other counts confirm, formats, refusals."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch

from moe_tool.artifacts.bench_report import BenchReport
from moe_tool.artifacts.json_fields import json_fields
from moe_tool.benchmarking.bench import bench
from moe_tool.benchmarking.bench_plan import BenchOptions, SpeedTest, list_tests
from moe_tool.benchmarking.bench_tokens import bench_tokens
from moe_tool.benchmarking.speed_run import run_test
from moe_tool.budget.request import parse_memory
from moe_tool.cli.app import run_command
from moe_tool.demo import demo_model_path
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.locate import LocatedModel
from moe_tool.policies.misses import EXACT_POLICY, parse_miss_policy
from moe_tool.reports.bench_formats import csv_rows, json_rows, markdown_rows
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from tests.packed import pack_bundle
from tests.tiny_models import tiny_tokenizer

SMALL = ("--prompt-tokens", "16", "--generate", "4", "--repetitions", "2", "--threads", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benched") / "bundle"
    pack_bundle(LocatedModel(folder=demo_model_path(), name="demo"), out=out, bits="8")
    return out


@pytest.fixture(scope="module")
def report(bundle: Path) -> BenchReport:
    options = BenchOptions(
        prompt_tokens=(16, 0),
        generate=(4, 6),
        depth=(0, 8),
        memory=tuple(map(parse_memory, ("50%", "min", "100%"))),
        policy=(EXACT_POLICY, parse_miss_policy("drop")),
        threads=(1,),
        repetitions=2,
        gates=False,
    )
    return bench(bundle, options)


def test_there_is_a_row_for_every_combination(report: BenchReport) -> None:
    tests = ["pp16", "tg4", "tg6", "pp16 @ d8", "tg4 @ d8", "tg6 @ d8"]
    expected = [
        (budget, policy, test)
        for budget in ("50%", "min", "100%")
        for policy in ("exact", "drop")
        for test in tests
    ]
    assert [(row.budget, row.setup.policy, row.test) for row in report.rows] == expected


def test_its_figures_are_those_of_the_bundle(report: BenchReport, bundle: Path) -> None:
    with BundleReader.open(bundle) as reader:
        record = reader.manifest.primaries[0].record_size_bytes
        accesses = len(reader.manifest.shape.layers) * reader.manifest.shape.top_k
        n_experts = len(reader.manifest.primary_records)
    n_weights = sum(t.numel() for t in _tensors(demo_model_path()))
    for row in report.rows:
        assert (row.bundle.model, row.bundle.bits) == ("demo", "8")
        assert (row.setup.threads, row.cache) == (1, "warm")
        assert row.bundle.params == n_weights
        assert row.bundle.size_bytes <= sum(file.stat().st_size for file in bundle.iterdir())
        low, high = min(row.tokens_per_second_all), max(row.tokens_per_second_all)
        assert low <= row.tokens_per_second <= high
        # Of two numbers the sample deviation is their distance over the root of two.
        assert row.tokens_per_second_sd == pytest.approx((high - low) / 2**0.5)
        assert 0 <= row.stall_share <= 1
        assert row.timed.tokens == 2 * row.n_tokens  # no repetition counts another's depth
        assert row.tokens_from == "text"
        if row.test.startswith("tg") and row.setup.policy == "exact":
            misses = (1 - row.timed.hit_rate) * accesses
            assert row.timed.bytes_read_per_token == pytest.approx(misses * record)
        if row.test.startswith("tg") and row.setup.policy == "drop":
            assert row.timed.bytes_read_per_token == 0
        if row.budget == "100%":
            assert row.setup.slots == n_experts
    by_budget = {row.budget: row for row in report.rows if row.test == "tg6"}
    exact = {
        row.budget: row for row in report.rows if (row.test, row.setup.policy) == ("tg6", "exact")
    }
    assert by_budget["min"].setup.slots < by_budget["50%"].setup.slots
    assert by_budget["50%"].setup.slots < by_budget["100%"].setup.slots
    assert exact["min"].timed.hit_rate < exact["100%"].timed.hit_rate


def _tensors(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_every_format_says_the_same(report: BenchReport) -> None:
    rows = report.rows
    parsed = json.loads(json_rows(rows))
    assert [entry["test"] for entry in parsed] == [row.test for row in report.rows]
    assert parsed == json.loads(json.dumps(json_fields(rows)))
    table = list(csv.DictReader(io.StringIO(csv_rows(rows))))
    assert [float(row["tokens_per_second"]) for row in table] == [
        row.tokens_per_second for row in report.rows
    ]
    assert len(table[0]["tokens_per_second_all"].split(";")) == 2
    head, rule, *lines = markdown_rows(rows).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == (
        ["model", "size", "params", "bits", "budget", "policy", "eviction", "prefetch", "threads"]
        + ["test", "tokens/s", "hit rate", "bytes/token", "stall share", "peak RSS", "cache"]
    )
    assert len(lines) == len(rows)
    assert {len(line) for line in (head, rule, *lines)} == {len(head)}
    assert "±" in lines[0]


def test_rows_with_and_without_prefetch_stand_side_by_side(bundle: Path) -> None:
    options = BenchOptions(
        prompt_tokens=(16,),
        generate=(12,),
        memory=(parse_memory("50%"),),
        prefetch=("none", "next-layer"),
        threads=(1,),
        repetitions=2,
    )
    rows = bench(bundle, options).rows
    assert [(row.setup.prefetch, row.test) for row in rows] == [
        (prefetch, test) for prefetch in ("none", "next-layer") for test in ("pp16", "tg12")
    ]
    plain, ahead = rows[1].timed, rows[3].timed
    assert plain.prefetches == plain.prefetched_bytes == 0
    assert rows[2].timed.prefetches == 0  # a prompt
    with BundleReader.open(bundle) as reader:
        record = reader.manifest.primaries[0].record_size_bytes
        accesses = len(reader.manifest.shape.layers) * reader.manifest.shape.top_k
    assert ahead.tokens == 24 and ahead.hits + ahead.misses == 24 * accesses
    assert 0 < ahead.prefetch_hits <= ahead.prefetches
    assert ahead.prefetch_hits * record <= ahead.prefetched_bytes
    assert ahead.bytes_read - ahead.prefetched_bytes == ahead.misses * record
    lines = markdown_rows(rows).splitlines()
    assert "| none " in lines[3]
    assert f"| next-layer ({ahead.prefetch_hit_rate:.0%} used, " in lines[5]


def test_a_cold_run_reads_what_a_warm_one_has(bundle: Path) -> None:
    """With room for all, the second run of the same tokens reads nothing, unless made cold."""
    test = SpeedTest(kind="tg", n_tokens=4, depth=3)
    ids = torch.arange(2, 9)
    with open_session(bundle, run_options(memory="100%", threads=1, context=16)) as session:
        shape = session.manifest.shape
        first = run_test(session, test, ids, cache_state="cold")
        warm = run_test(session, test, ids, cache_state="warm")
        cold = run_test(session, test, ids, cache_state="cold")
        prompt = run_test(
            session, SpeedTest(kind="pp", n_tokens=4, depth=3), ids, cache_state="warm"
        )
    assert (warm.counters.misses, warm.counters.bytes_read) == (0, 0)
    assert cold.counters.misses == first.counters.misses > 0
    assert cold.counters.tokens == warm.counters.tokens == prompt.counters.tokens == 4
    assert warm.counters.forwards == 4 and prompt.counters.forwards == 1
    accesses = warm.counters.hits + warm.counters.misses
    assert accesses == 4 * shape.top_k * len(shape.layers)


def test_tests_go_by_depth_and_zero_leaves_one_out() -> None:
    options = BenchOptions(prompt_tokens=(0,), generate=(4,), depth=(0, 12))
    labels = [test.label for test in list_tests(options, context_limit=16)]
    assert labels == ["tg4", "tg4 @ d12"]
    with pytest.raises(UsageError, match="tg4 @ d12 takes 16 positions"):
        list_tests(options, context_limit=15)


def test_a_vocabulary_smaller_than_the_tokenizers_gives_random_ids() -> None:
    tokenizer = tiny_tokenizer()
    for vocabulary in (1, 2, 3):
        ids, kind = bench_tokens(
            tokenizer, n_tokens=50, vocabulary=vocabulary, seed=0, random=False
        )
        assert kind == "random"
        assert ids.shape == (50,)
        assert set(ids.tolist()) <= set(range(vocabulary))


def test_a_depth_beyond_the_model_is_refused_before_anything_is_loaded(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((bundle / "config.json").read_text())
    assert run_command(["bench", str(tmp_path), *SMALL, "--depth", "2000"]) == 2
    assert "positions" in capsys.readouterr().err  # and not that this is no bundle


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--depth", "2000"], 2, "positions"),
        (["--memory", "1MiB"], 4, "too small"),
        (["--generate", "many"], 2, "whole numbers"),
        (["--generate", "0", "--prompt-tokens", "0"], 2, "nothing is left"),
        (["--policy", "exact,magic"], 2, "magic"),
        (["--policy", "exact,buddy"], 2, "buddies"),
        (["--memory", "50%,"], 2, "empty"),
        (["--prefetch", "none,magic"], 2, "--prefetch magic"),
        (["--policy", "drop", "--no-gates", "--prefetch", "next-layer"], 2, "frozen"),
        (["--threads", "0"], 2, "--threads 0"),
        (["--threads", "9" * 20], 2, "1 to 1024"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    code: int,
    words: str,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(["bench", str(bundle), *SMALL, *arguments]) == code
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


def test_rows_before_an_error_are_not_lost(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(bundle), *SMALL, "--memory", "50%,1MiB", "--format", "jsonl"]
    assert run_command(command) == 4
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["test"] for row in rows] == ["pp16", "tg4"]


def test_json_is_one_object(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", str(bundle), *SMALL, "--cache", "cold", "--random", "--json"]
    assert run_command(command) == 0
    out, err = capsys.readouterr()
    fields = json.loads(out)
    assert [row["cache"] for row in fields["rows"]] == ["cold", "cold"]
    assert [row["tokens_from"] for row in fields["rows"]] == ["random", "random"]
    assert fields["rows"][0]["peak_rss_bytes"] > 0
    assert fields["load_average"] >= 0
    assert "| pp16" in err
