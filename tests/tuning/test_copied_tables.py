"""A tuned bundle's embedding tables are copied piece by piece, and checked on the way."""

import gc
from pathlib import Path

import pytest

from moe_tool.allocator import return_freed_memory
from moe_tool.artifacts.bundle_manifest import TunedWeights
from moe_tool.available_memory import current_rss_bytes, peak_rss_bytes, reset_peak_rss
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.locate import LocatedModel
from moe_tool.progress import SILENT
from moe_tool.tuning.copied_bundle import CopiedBundle
from tests.packed import pack_bundle
from tests.table_models import TABLE, make_table_model

TABLE_BYTES = 4096 * 1024 * 4 * 2
STEP = TunedWeights(
    parent_sha256="0" * 64,
    sources=("text",),
    tokens=1,
    tokens_sha256="0" * 64,
    steps=1,
    batch_tokens=1,
    optimizer="sgd",
    rounding="nearest",
    feedback="none",
    rate=1.0,
    seed=0,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    make_table_model(folder / "model", n_rows=4096, width=1024)
    pack_bundle(LocatedModel(folder=folder / "model", name="m"), out=folder / "bundle", bits="4")
    return folder / "bundle"


def begun(reader: BundleReader, out: Path) -> CopiedBundle:
    """A copy that lacks everything but the experts."""
    copied = CopiedBundle(reader, out, STEP)
    for form, layer, expert in copied.writer.to_write:
        copied.writer.write_record(form, layer, expert, copied.old_record(form, layer, expert))
    return copied


def test_a_table_is_never_in_memory(bundle: Path, tmp_path: Path) -> None:
    with BundleReader.open(bundle) as reader:
        copied = begun(reader, tmp_path / "copy")
        gc.collect()
        return_freed_memory()
        if not reset_peak_rss():
            pytest.skip("the peak of the process cannot be reset here")
        before = current_rss_bytes()
        copied.finish(SILENT)
        assert peak_rss_bytes() - before < TABLE_BYTES / 2
    with BundleReader.open(tmp_path / "copy") as new, BundleReader.open(bundle) as old:
        new.verify_all()
        assert new.manifest.skeleton == old.manifest.skeleton
        assert new.manifest.row_tables == old.manifest.row_tables
        assert old.manifest.row_tables is not None
        assert [part.tensor for part in old.manifest.row_tables.parts] == [TABLE]


def test_a_damaged_table_is_refused(bundle: Path, tmp_path: Path) -> None:
    with BundleReader.open(bundle) as reader, reader.open_skeleton() as skeleton:
        info = skeleton.tensors[TABLE]
        place = info.offset + info.size_bytes // 2
        with open(info.file, "r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
        try:
            with pytest.raises(CorruptArtifactError, match="hash of"):
                begun(reader, tmp_path / "copy").finish(SILENT)
        finally:
            with open(info.file, "r+b") as file:
                file.seek(place)
                file.write(byte)
    assert not (tmp_path / "copy").exists()
