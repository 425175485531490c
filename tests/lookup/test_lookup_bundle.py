"""A MoLE packed to rows: the same logits, rows decoded by others, bytes, memory, damaged files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.lookup_manifest import LookupManifest
from moe_tool.available_memory import current_rss_bytes, peak_rss_bytes, reset_peak_rss
from moe_tool.budget.request import parse_memory
from moe_tool.cli.app import run_command
from moe_tool.errors import (
    BudgetError,
    CorruptArtifactError,
    MoeToolError,
    UnsupportedModelError,
    UsageError,
)
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.lookup.disk_rows import load_model
from moe_tool.lookup.pack_lookup import pack_lookup
from moe_tool.lookup.run_lookup import LookupResult, run_lookup
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.mole.expert_rows import expert_rows
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.store.throttle import Throttle, ThrottledDisk, parse_throttle
from tests.lookup.tiny_mole import make_mole, tiny_mole
from tests.tiny_models import VOCABULARY

ROW_WIDTH = 3 * 5 * 32
BLOCK_BYTES = 2**16
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def packed(folder: Path, *, bits: str = "native", dtype: str = "float32") -> Path:
    model = make_mole(folder / "model", dtype=dtype)
    pack_lookup(LocatedModel(folder=model, name="tiny"), bits=bits, out=folder / "bundle")
    return folder / "bundle"


def generated(
    folder: Path, prompt: str, n: int = 6, memory: str = "auto", throttle: Throttle | None = None
) -> LookupResult:
    return run_lookup(
        folder,
        prompt,
        memory=parse_memory(memory),
        context=200,
        threads=None,
        generation=GenerateOptions(max_tokens=n, ignore_eos=True),
        throttle=throttle,
    )


class LookupOpen:
    """A bundle's model and rows, closed at the end."""

    def __init__(self, folder: Path) -> None:
        self._model, self._table = load_model(LookupBundle.open(folder))

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self._model, self._table

    def __exit__(self, *_: object) -> None:
        self._table.rows.close()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("native"))


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float16", 1e-2)])
def test_logits_are_the_checkpoints_over_the_whole_vocabulary(
    tmp_path: Path, dtype: str, most: float
) -> None:
    folder = packed(tmp_path, dtype=dtype)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    model, table = load_model(LookupBundle.open(folder))
    ids = torch.cat([torch.arange(VOCABULARY), torch.arange(VOCABULARY).flip(0)]).view(-1, 52)
    with torch.inference_mode():
        away = (model(input_ids=ids).logits - exact(input_ids=ids).logits).abs().max()
    assert away <= most
    assert table.rows.width == ROW_WIDTH * (4 if dtype == "float32" else 2)
    table.rows.close()


def test_text_is_that_of_transformers(native: Path) -> None:
    prompt = "the cat sat on the mat"
    ids = torch.tensor([load_tokenizer(native)(prompt)["input_ids"]])
    wanted = tiny_mole().generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert list(generated(native, prompt, 12).token_ids) == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("bits", ["8", "nf4"])
def test_quantized_rows_are_what_a_reference_decodes(tmp_path: Path, bits: str) -> None:
    folder = packed(tmp_path, bits=bits)
    data = (folder / "rows.safetensors").read_bytes()
    n_codes, n_blocks = (ROW_WIDTH if bits == "8" else ROW_WIDTH // 2), -(-ROW_WIDTH // 64)
    table = np.frombuffer(data[8 + int.from_bytes(data[:8], "little") :], np.uint8)
    table = table.reshape(VOCABULARY, n_codes + 4 * n_blocks)
    exact = expert_rows(tiny_mole(), torch.arange(VOCABULARY)).numpy()
    with LookupOpen(folder) as (_, rows):
        found = rows(torch.arange(VOCABULARY)).numpy()
    for token in (0, 7, VOCABULARY - 1):
        scales = table[token, n_codes:].tobytes()
        for at in range(ROW_WIDTH):
            block = exact[token, at // 64 * 64 : at // 64 * 64 + 64]
            largest = np.float32(np.abs(block).max())
            scale = np.frombuffer(scales, np.float32)[at // 64]
            if bits == "8":
                value = np.float32(table[token, :n_codes].view(np.int8)[at]) * scale
                assert abs(value - exact[token, at]) <= largest / 127 * 0.5001
            else:
                byte = int(table[token, at // 2])
                code = byte >> 4 if at % 2 == 0 else byte & 15
                assert scale == largest
                assert code == int(np.abs(np.array(NF4) - exact[token, at] / largest).argmin())
                value = np.float32(NF4[code]) * scale
            assert found[token, at] == pytest.approx(value, rel=1e-6, abs=1e-12)


def test_a_token_reads_its_row_once_and_neighbours_come_together(
    native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes = ROW_WIDTH * 4
    with LookupOpen(native) as (model, table):
        reads: list[int] = []
        real = os.preadv

        def counted(handle: int, buffers: list[memoryview], offset: int) -> int:
            reads.append(len(buffers[0]))
            return real(handle, buffers, offset)

        monkeypatch.setattr(os, "preadv", counted)
        ids = torch.tensor([[9, 3, 9, 4, 200, 5, 3]])
        with torch.inference_mode():
            model(input_ids=ids)
            # The block of 3 to 9 and that of 200 are read whole, once, to be checked.
            assert reads == [BLOCK_BYTES, row_bytes, BLOCK_BYTES]
            assert table.rows.bytes_read == 5 * row_bytes
            # The rows of 3, 4, 5 and that of 200 came with the blocks, and so did the rest of them.
            assert table.rows.bytes_beside == 2 * BLOCK_BYTES - 4 * row_bytes
            reads.clear()
            model(input_ids=ids)
        assert reads == [3 * row_bytes, row_bytes, row_bytes]  # 3 to 5, 9, 200


def test_opening_reads_nothing_of_the_table(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = LookupBundle.open(native)
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("the table was read"))
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("the table was read"))
    rows = bundle.open_rows()
    rows.close()


def test_hashes_are_those_of_the_blocks_of_the_file(native: Path) -> None:
    data = (native / "rows.safetensors").read_bytes()
    table = data[8 + int.from_bytes(data[:8], "little") :]
    blocks = [table[at : at + BLOCK_BYTES] for at in range(0, len(table), BLOCK_BYTES)]
    manifest = LookupBundle.open(native).manifest
    assert len(blocks) == 8 and manifest.rows.block_bytes == BLOCK_BYTES
    assert manifest.rows.hashes == [xxhash.xxh3_64_hexdigest(block) for block in blocks]


def test_a_damaged_row_is_refused_when_its_block_is_read(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(native, folder)
    _flip("rows.safetensors")(folder)
    with LookupOpen(folder) as (_, rows):
        rows(torch.arange(200))
        with pytest.raises(CorruptArtifactError, match="is damaged: the hash of bytes"):
            rows(torch.tensor([VOCABULARY - 2]))
    assert run_command(["inspect", str(folder)]) == 0
    assert run_command(["inspect", str(folder), "--verify"]) == 3
    assert "the hash of bytes" in capsys.readouterr().err


def test_a_run_counts_its_rows(native: Path) -> None:
    found = generated(native, "abcdefgh", 5)
    assert found.row_bytes == ROW_WIDTH * 4
    # 8 different tokens of the prompt, then one token a forward; the last is never looked up.
    assert found.rows_read == 8 + 4
    assert found.row_bytes_read == 12 * ROW_WIDTH * 4
    assert generated(native, "aaaaaaaa", 1).rows_read == 1


def test_rows_pass_a_throttled_disk(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    monkeypatch.setattr(ThrottledDisk, "wait", lambda _, n, **__: passed.append(n))
    unslowed = generated(native, "abcdefgh", 5)
    assert not passed
    slowed = generated(native, "abcdefgh", 5, throttle=parse_throttle("1MB/s,1ms"))
    assert slowed.token_ids == unslowed.token_ids
    # Blocks that are checked are read whole, beside the rows of what is known already.
    n_rows = sum(n for n in passed if n != BLOCK_BYTES)
    assert n_rows <= slowed.row_bytes_read <= sum(passed)
    assert passed.count(BLOCK_BYTES) <= 8


@pytest.mark.slow
def test_the_table_is_never_in_memory(tmp_path: Path) -> None:
    model = make_mole(tmp_path / "model", vocab_size=12_000, num_experts=16)
    located = LocatedModel(folder=model, name="tiny")
    # Everything that is loaded once, libraries and a first forward, is there before measuring.
    generated(packed(tmp_path / "small"), "ab")
    if not reset_peak_rss():
        pytest.skip("the peak of the process cannot be reset here")
    before = current_rss_bytes()
    report = pack_lookup(located, bits="native", out=tmp_path / "bundle")
    assert report.table_bytes == 12_000 * 3 * 16 * 32 * 4
    assert peak_rss_bytes() - before < report.table_bytes / 2
    reset_peak_rss()
    before = current_rss_bytes()
    found = generated(tmp_path / "bundle", "the cat", memory="min")
    assert peak_rss_bytes() - before < report.table_bytes / 4
    assert found.peak_rss_bytes <= found.memory_budget_bytes


def test_a_budget_that_is_too_small_is_refused(native: Path) -> None:
    with pytest.raises(BudgetError, match="rows of"):
        generated(native, "abc", memory="1MiB")
    with pytest.raises(UsageError, match="no share"):
        generated(native, "abc", memory="50%")


def test_the_command_line_packs_runs_and_inspects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(make_mole(tmp_path / "model")), str(tmp_path / "b")
    assert run_command(["pack", model, "--bits", "nf4", "--out", out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["row_bytes"] == ROW_WIDTH // 2 + 4 * -(-ROW_WIDTH // 64)
    run = ["run", out, "--prompt", "abc", "--max-tokens", "3"]
    assert run_command([*run, "--json", "--ignore-eos"]) == 0
    assert json.loads(capsys.readouterr().out)["rows_read"] == 5
    assert run_command(["inspect", out, "--verify"]) == 0
    assert "lookup bundle" in capsys.readouterr().out
    assert run_command([*run, "--throttle", "100MB/s"]) == 0
    assert "rows of tables are slowed to" in capsys.readouterr().err
    assert run_command([*run, "--policy", "drop"]) == 2
    assert run_command(["pack", model, "--bits", "4", "--out", out]) == 2
    assert run_command(["pack", model, "--out", out]) == 2  # it is there


def test_what_needs_routing_refuses_a_mole(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    located = LocatedModel(folder=make_mole(tmp_path / "model"), name="tiny")
    with pytest.raises(UnsupportedModelError, match="no routing to profile") as refused:
        open_model(located)
    assert "moe-tool pack" in str(refused.value.hint)
    calibrate = ["calibrate", str(native), "--data", "builtin:eval", "--max-kl", "0.1"]
    assert run_command(calibrate) == 3
    assert "only moe-tool run, evaluate, bench and inspect" in capsys.readouterr().err


def _resealed(folder: Path, **changes: object) -> None:
    manifest = read_json_artifact(folder / "manifest.json", LookupManifest)
    write_json_artifact(folder / "manifest.json", manifest.model_copy(update=changes))


def _cut(folder: Path) -> None:
    os.truncate(folder / "rows.safetensors", (folder / "rows.safetensors").stat().st_size - 1)


def _flip(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-5] ^= 1
        (folder / name).write_bytes(data)

    return flip


def _change_row_of_b(folder: Path) -> None:
    data = bytearray((folder / "rows.safetensors").read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    (token,) = load_tokenizer(folder)("b")["input_ids"]
    data[begin + token * ROW_WIDTH * 4] ^= 1
    (folder / "rows.safetensors").write_bytes(data)


def _one_hash_too_many(folder: Path) -> None:
    rows = read_json_artifact(folder / "manifest.json", LookupManifest).rows
    _resealed(folder, rows=rows.model_copy(update={"xxh3": rows.xxh3 + "0" * 16}))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (_cut, "bytes, its manifest says"),
    "missing": (lambda f: (f / "rows.safetensors").unlink(), "is missing"),
    "narrower": (lambda f: _resealed(f, row_bytes=ROW_WIDTH * 4 - 4), "says a row has"),
    "other form": (lambda f: _resealed(f, form="F16"), "says a row has"),
    "fewer rows": (lambda f: _resealed(f, vocabulary=VOCABULARY - 1), "the table is U8"),
    "other shape": (lambda f: _resealed(f, layers=5, experts=3), "do not agree on the layers"),
    "changed row": (_change_row_of_b, "hash of"),
    "a hash too many": (_one_hash_too_many, "has 9 hashes of the table, whose blocks are 8"),
    "changed weight": (_flip("skeleton.safetensors"), "hash of"),
    "changed config": (_flip("config.json"), "sha256"),
    "not listed": (lambda f: (f / "extra.py").write_text(""), "is not listed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bundles_are_refused_in_one_sentence(
    native: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(native, folder)
    break_it, words = DAMAGE[damage]
    break_it(folder)
    assert run_command(["run", str(folder), "--prompt", "abc", "--max-tokens", "1"]) == 3
    printed = capsys.readouterr().err
    assert words in printed and "Traceback" not in printed


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape"])
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path: Path, wrong: str) -> None:
    model = make_mole(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.experts.2.up_proj.weight"
    if wrong == "missing":
        del tensors[name]
    elif wrong == "extra":
        tensors["model.layers.7.router.weight"] = torch.zeros(5, 32)
    else:
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(MoeToolError) as refused:
        pack_lookup(LocatedModel(folder=model, name="t"), bits="8", out=tmp_path / "b")
    assert refused.value.exit_code == 3
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.part").exists()
