"""Damaged and forged mask routers are refused by name; the bundle without them stays what it is."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_tool.artifacts.mask_router import MASK_ROUTER_PARTS
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_reader import BundleReader
from tests.formats.hostile.damage import json_changed
from tests.formats.made_mask_router import put_mask_router, random_mask_router
from tests.formats.small_bundle import SHAPE, write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = write_bundle(tmp_path / "bundle")
    put_mask_router(folder)
    return folder


def _router(folder: Path) -> Path:
    return next(folder.glob("pruning-*.safetensors"))


def _forged(folder: Path, change: Callable[[dict, bytearray], object]) -> None:
    """Change header or numbers, with every size and hash right again."""
    path = _router(folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    change(header, body)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)

    def relist(parsed: dict) -> None:
        entry = next(each for each in parsed["files"] if each["name"] == path.name)
        entry["size_bytes"] = path.stat().st_size
        entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    json_changed(relist)(folder / "manifest.json")


def _refusal(folder: Path) -> str:
    with pytest.raises(CorruptArtifactError) as refused, BundleReader.open(folder) as reader:
        reader.mask_router()
    assert refused.value.exit_code == 3 and refused.value.hint
    return refused.value.message


def test_what_is_written_is_read_back_to_the_last_bit(bundle: Path) -> None:
    with BundleReader.open(bundle) as reader:
        found = reader.mask_router()
        reader.verify_all()
    assert found is not None
    for layer, wanted in random_mask_router(SHAPE).items():
        for part in MASK_ROUTER_PARTS:
            np.testing.assert_array_equal(getattr(found[layer], part), getattr(wanted, part))


def test_a_bundle_without_routers_has_none(tmp_path: Path) -> None:
    with BundleReader.open(write_bundle(tmp_path / "plain")) as reader:
        assert reader.mask_router() is None


def test_a_cut_or_a_missing_file_is_refused_when_the_bundle_is_opened(bundle: Path) -> None:
    path = _router(bundle)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"{path} has {len(data) - 1} bytes" in _refusal(bundle)
    path.unlink()
    assert f"{path} is missing" in _refusal(bundle)


def test_a_flipped_bit_is_found(bundle: Path) -> None:
    path = _router(bundle)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert _refusal(bundle) == f"{path} is damaged: its sha256 does not fit"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h, b: h.update({"layer.9.bias": h.pop("layer.1.bias")}), "lacks 'layer.1.bias'"),
        (
            lambda h, b: h.update(
                {"extra": {"dtype": "F32", "shape": [0], "data_offsets": [len(b), len(b)]}}
            ),
            "holds the unknown 'extra'",
        ),
        (
            lambda h, b: h["layer.1.by_hidden"].update(shape=[72, 1]),
            "'layer.1.by_hidden' is F32 [72, 1], wanted F32 [1, 72]",
        ),
        (
            lambda h, b: h["layer.1.by_hidden"].update(dtype="I32"),
            "'layer.1.by_hidden' is I32 [1, 72], wanted F32 [1, 72]",
        ),
        (lambda h, b: b.__setitem__(slice(0, 4), np.float32(np.nan).tobytes()), "holds NaN"),
        (lambda h, b: b.__setitem__(slice(0, 4), np.float32(np.inf).tobytes()), "holds NaN"),
        (lambda h, b: b.extend(b"more"), "longer than its header says"),
    ],
    ids=["foreign layer", "extra", "shape", "dtype", "nan", "inf", "longer"],
)
def test_a_forgery_is_refused(bundle: Path, change: Callable, says: str) -> None:
    _forged(bundle, change)
    assert says in _refusal(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p.update(file="../x.safetensors"), "mask-router.file"),
        (lambda p: p.update(file="config.json"), "mask-router.file"),
        (
            lambda p: p.update(file=f"pruning-{1:016x}.safetensors"),
            "the file of the pruning is not listed",
        ),
        (lambda p: p["offsets"].pop(), "mask-router.offsets"),
        (lambda p: p["offsets"].reverse(), "the offsets of the pruning fall"),
        (lambda p: p.update(rate=1.0), "mask-router.rate"),
        (lambda p: p.update(unknown=1), "mask-router.unknown"),
    ],
)
def test_a_forged_manifest_is_refused(bundle: Path, change: Callable, says: str) -> None:
    json_changed(lambda parsed: change(parsed["sections"]["mask-router"]["body"]))(
        bundle / "manifest.json"
    )
    assert says in _refusal(bundle)


def test_what_a_stopped_training_left_behind_is_in_nobodys_way(bundle: Path) -> None:
    left = bundle / "pruning-0123456789abcdef.safetensors"
    left.write_bytes(b"half")
    with BundleReader.open(bundle) as reader:
        assert reader.mask_router() is not None
    put_mask_router(bundle, seed=1)
    assert not left.exists()
    (bundle / "pruning-x.safetensors").write_bytes(b"")
    assert "is not listed" in _refusal(bundle)
