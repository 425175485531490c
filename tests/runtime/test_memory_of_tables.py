"""No step holds a large embedding table in memory: packing, profiling, and runs by row."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_tool.allocator import return_freed_memory
from moe_tool.artifacts.run_result import RunResult
from moe_tool.available_memory import current_rss_bytes, peak_rss_bytes, reset_peak_rss
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import run_prompt
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.table_models import TABLE, make_table_model

_ROWS, _WIDTH, _LAYERS = 4096, 1024, 4
_STORED_BYTES = _ROWS * _WIDTH * _LAYERS * 2
"""Size of the table per layer: 32 MiB of bfloat16, twice as much in memory, the least that stays"""
_SLACK_BYTES = 16 * 2**20
"""Most that two measurements of the same work may differ by"""
_GENERATION = GenerateOptions(max_tokens=4, ignore_eos=True)


def _grown(work: Callable[[], object]) -> int:
    """Return by how much the process grew at most while something was done."""
    gc.collect()
    return_freed_memory()
    if not reset_peak_rss():
        pytest.skip("the peak of the process cannot be reset here")
    before = current_rss_bytes()
    work()
    return peak_rss_bytes() - before


def _run(bundle: Path, rows: str) -> RunResult:
    options = run_options(memory="min", threads=1, context=64, rows=rows)
    return run_prompt(bundle, "the list of words", options=options, generation=_GENERATION)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of Gemma 4's kind whose table per layer is all but nothing of it."""
    folder = tmp_path_factory.mktemp("tables") / "model"
    return make_table_model(folder, n_rows=_ROWS, width=_WIDTH)


@pytest.mark.slow
def test_a_damaged_block_is_refused_when_one_of_its_rows_is_read(
    model: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    pack_bundle(LocatedModel(folder=model, name="m"), out=bundle)
    with BundleReader.open(bundle) as reader, reader.open_skeleton() as skeleton:
        info = skeleton.tensors[TABLE]
    row_bytes = _WIDTH * _LAYERS * 2
    options = run_options(memory="min", context=64, threads=1)
    for row, is_read in ((3000, False), (84, True)):
        with open(info.file, "r+b") as file:
            file.seek(info.offset + row * row_bytes)
            file.write(b"\x2a")
        with open_session(bundle, options) as session:
            assert session.plan.on_disk
            if is_read:
                with pytest.raises(CorruptArtifactError, match="is damaged: the hash of bytes"):
                    session.model(input_ids=torch.tensor([[row, 101, 32]]))
            else:
                session.model(input_ids=torch.tensor([[84, 101, 32]]))
    with pytest.raises(CorruptArtifactError, match="damaged"), BundleReader.open(bundle) as reader:
        reader.verify_all()


@pytest.mark.slow
def test_no_step_holds_the_table(model: Path, tmp_path: Path) -> None:
    located = LocatedModel(folder=model, name="m")
    whole, bundle = tmp_path / "whole", tmp_path / "bundle"
    # What is loaded once, libraries and a first forward, is there before anything is measured.
    pack_bundle(located, out=tmp_path / "first")
    _run(tmp_path / "first", "auto")
    packed_whole = _grown(lambda: pack_bundle(located, out=whole, rows="none"))
    packed = _grown(lambda: pack_bundle(located, out=bundle))
    assert packed_whole - packed > 2 * _STORED_BYTES - _SLACK_BYTES
    texts: list[str] = []
    in_memory = _grown(lambda: texts.append(_run(bundle, "none").text))
    on_disk = _grown(lambda: texts.append(_run(bundle, "auto").text))
    assert texts[0] == texts[1]
    assert in_memory - on_disk > 2 * _STORED_BYTES - _SLACK_BYTES
    text = tmp_path / "text.txt"
    text.write_text("the list of words and more of them. " * 40)
    sources = parse_sources([str(text)])
    profiled = _grown(
        lambda: record_profile(located, sources, out=tmp_path / "p.h5", tokens=64, seq_len=32)
    )
    assert profiled < _STORED_BYTES
