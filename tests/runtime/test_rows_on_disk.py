"""Embedding tables stay on disk: the same tokens, fewer bytes in memory, rows read once each."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.budget.table_choice import RowsRequest
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from moe_tool.inspection.describe_bundle import describe_bundle
from moe_tool.models.locate import LocatedModel
from moe_tool.models.row_tables import RowsOnDisk
from moe_tool.progress import Progress
from moe_tool.reports.run_lines import run_line
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids, run_prompt
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from tests.packed import pack_bundle
from tests.tiny_models import tiny_tokenizer
from tests.zoo.text_models import TEXT_MODELS


class Notes(Progress):
    """Keeps the notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


PROMPT = [256, 84, 104, 101, 32, 108, 105, 115, 116, 104]
DISTINCT = 9
PER_LAYER = {
    "gemma4_text": "model.embed_tokens_per_layer.weight",
    "qwen4_exp_text": "ngram_embedding.weight",
}
"""Model type -> its table beside the input embedding"""


@pytest.fixture(scope="module")
def zoo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return model type -> (checkpoint, bundle) of bfloat16; never change them."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            kind = TEXT_MODELS[name]
            if name == "qwen4_exp_text":
                kind = replace(kind, fields=kind.fields | {"ple_layer_ids": [2]})
            config = kind.config(name)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder / "model")
            tiny_tokenizer().save_pretrained(folder / "model")
            located = LocatedModel(folder=folder / "model", name=name)
            pack_bundle(located, out=folder / "bundle")
            made[name] = folder / "model", folder / "bundle"
        return made[name]

    return make


def opened(bundle: Path, rows: str) -> Session:
    return open_session(bundle, run_options(memory="min", context=64, threads=1, rows=rows))


def lookups(session: Session) -> dict[str, RowsOnDisk]:
    """Parameter -> its lookup, of tables on disk."""
    found = {name: m.__dict__.get("forward") for name, m in session.model.named_modules()}
    return {f"{name}.weight": f for name, f in found.items() if isinstance(f, RowsOnDisk)}


def tokens_and_logits(session: Session) -> tuple[list[int], torch.Tensor]:
    made = generate_ids(session, [PROMPT], GenerateOptions(max_tokens=12, ignore_eos=True))
    with torch.inference_mode():
        logits = session.model(input_ids=torch.tensor([PROMPT])).logits
    return list(made.token_ids[0]), logits


@pytest.mark.parametrize("name", ["gemma4_text", "qwen4_exp_text", "olmoe"])
def test_tables_on_disk_change_no_bit(
    name: str, zoo_bundle: Callable[[str], tuple[Path, Path]]
) -> None:
    _, bundle = zoo_bundle(name)
    with opened(bundle, "none") as session:
        assert not lookups(session) and not session.plan.on_disk
        wanted, wanted_logits = tokens_and_logits(session)
        held = {line.name: line.size_bytes for line in session.plan.memory.lines}
    with opened(bundle, "1") as session:
        found, logits = tokens_and_logits(session)
        left = session.plan.on_disk
        assert lookups(session).keys() == left.keys() and left
        now = {line.name: line.size_bytes for line in session.plan.memory.lines}
        parameters = {n for n, _ in session.model.named_parameters()}
    assert found == wanted and torch.equal(logits, wanted_logits)
    assert held["skeleton"] - now["skeleton"] == sum(left.values())
    assert not parameters & left.keys()
    if name in PER_LAYER:
        assert any(parameter.endswith(PER_LAYER[name]) for parameter in left)


def test_the_table_of_a_tied_head_stays_in_memory(
    zoo_bundle: Callable[[str], tuple[Path, Path]],
) -> None:
    _, bundle = zoo_bundle("gemma4_text")
    with opened(bundle, "1") as session:
        assert list(session.plan.on_disk) == [PER_LAYER["gemma4_text"]]


def test_each_distinct_row_is_read_once_per_forward(
    zoo_bundle: Callable[[str], tuple[Path, Path]],
) -> None:
    _, bundle = zoo_bundle("gemma4_text")
    with opened(bundle, "1") as session:
        (lookup,) = lookups(session).values()
        row_bytes = 4 * 16 * 2  # layers, width per layer, bytes of bfloat16
        before = lookup.rows.bytes_read
        tokens_and_logits(session)
        # Twice the prompt, and 11 of the 12 new tokens, which may be any.
        assert lookup.rows.bytes_read - before == (2 * DISTINCT + 11) * row_bytes


def test_auto_leaves_small_tables_in_memory_and_large_ones_if_it_must(
    zoo_bundle: Callable[[str], tuple[Path, Path]],
) -> None:
    _, bundle = zoo_bundle("olmoe")
    with opened(bundle, "auto") as session:
        assert not session.plan.on_disk
    forced = RowsRequest(kind="auto", least_bytes=1)
    for memory, is_left in (("min", True), ("50%", True), ("100%", False)):
        options = replace(run_options(memory=memory, context=64, threads=1), rows=forced)
        with open_session(bundle, options) as session:
            assert bool(session.plan.on_disk) == is_left
    with opened(bundle, str(260 * 64 * 2)) as session:
        assert list(session.plan.on_disk) == ["model.embed_tokens.weight"]
    with opened(bundle, str(260 * 64 * 2 + 1)) as session:
        assert not session.plan.on_disk


def test_a_run_says_what_stays_on_disk_and_what_was_read(
    zoo_bundle: Callable[[str], tuple[Path, Path]],
) -> None:
    _, bundle = zoo_bundle("olmoe")
    result = run_prompt(
        bundle,
        "the list",
        options=run_options(memory="min", threads=1, rows="1"),
        generation=GenerateOptions(max_tokens=3, ignore_eos=True),
        progress=(progress := Notes()),
    )
    assert result.setup.table_bytes_on_disk == 260 * 64 * 2
    n_distinct = 7  # letters of the prompt, and then 2 of the 3 new tokens
    assert result.row_bytes_read == (n_distinct + 2) * 64 * 2
    assert any("1 embedding table stays on disk (32.5 KiB)" in note for note in progress.notes)
    assert "of table rows read" in run_line(result)


def test_a_word_that_is_no_size_is_refused() -> None:
    with pytest.raises(UsageError, match="--rows many"):
        run_options(rows="many")


def place_of_row(bundle: Path, name: str) -> tuple[Path, int]:
    with BundleReader.open(bundle) as reader, reader.open_skeleton() as skeleton:
        info = skeleton.tensors[name]
        return info.file, info.offset + info.size_bytes // 2


def test_a_damaged_table_is_refused(
    zoo_bundle: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(zoo_bundle("olmoe")[1], tmp_path / "b"))
    file, offset = place_of_row(bundle, "model.embed_tokens.weight")
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    of_block = r"hash of bytes 0 to 33280 of .*embed_tokens.weight"
    with pytest.raises(CorruptArtifactError, match=of_block):
        opened(bundle, "1")  # its first forward needs a row
    without_blocks(bundle)
    with pytest.raises(CorruptArtifactError, match=r"hash of .*embed_tokens.weight"):
        opened(bundle, "1")


def without_blocks(bundle: Path) -> None:
    """Make a bundle as it was before tables had hashed blocks."""
    path = bundle / MANIFEST
    manifest = read_json_artifact(path, BundleManifest)
    write_json_artifact(path, manifest.model_copy(update={"sections": {}}))


def test_a_bundle_without_hashed_blocks_runs_the_same(
    zoo_bundle: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(zoo_bundle("gemma4_text")[1], tmp_path / "b"))
    with opened(bundle, "1") as session:
        wanted, wanted_logits = tokens_and_logits(session)
    without_blocks(bundle)
    with opened(bundle, "1") as session:
        assert session.plan.on_disk
        found, logits = tokens_and_logits(session)
    assert found == wanted and torch.equal(logits, wanted_logits)


def test_a_bundle_packed_for_rows_runs_so_by_default(
    zoo_bundle: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model = LocatedModel(folder=zoo_bundle("olmoe")[0], name="olmoe")
    for word, is_left in (("1KiB", True), ("none", False), ("auto", False)):
        pack_bundle(model, out=tmp_path / word, rows=word)
        options = run_options(memory="min", context=64, threads=1)
        with open_session(tmp_path / word, options) as session:
            assert bool(session.plan.on_disk) == is_left, word
    facts = describe_bundle(tmp_path / "1KiB", verify=True, progress=Notes()).facts
    assert facts["table model.embed_tokens.weight"] == "260 rows of 128 bytes, 32.5 KiB, on disk"


def test_a_table_changed_under_a_run_is_refused(
    zoo_bundle: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(zoo_bundle("olmoe")[1], tmp_path / "b"))
    file, offset = place_of_row(bundle, "model.embed_tokens.weight")
    with opened(bundle, "1") as session:
        with open(file, "r+b") as handle:
            handle.seek(offset)
            handle.write(b"\x01")
        with pytest.raises(CorruptArtifactError, match="was changed"):
            tokens_and_logits(session)
