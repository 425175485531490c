"""A skeleton of codes that are damaged, or not this model's, is refused by name."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton_loader import SkeletonLoader
from tests.formats.hostile.damage import Case, Damage, cut, flip, in_file, json_changed
from tests.formats.hostile.refusal import cases, require_refusal
from tests.packed import pack_bundle
from tests.tiny_models import make_tiny_checkpoint

MANIFEST, SKELETON = "manifest.json", "skeleton-00001.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
PLANE, SCALES = f"{Q}.plane0", f"{Q}.scales"
ROUTER = "model.layers.0.mlp.gate.weight"
Tensors = dict[str, torch.Tensor]


def forged(
    change: Callable[[Tensors], object], also: Callable[[dict[str, Any]], object] | None = None
) -> Damage:
    """Change the skeleton's tensors, and the manifest too, with every hash and size right."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / SKELETON)
        change(tensors)
        save_file(tensors, folder / SKELETON)
        data = (folder / SKELETON).read_bytes()

        def seal(parsed: dict[str, Any]) -> None:
            parsed["skeleton"] = [
                {"name": name, "xxh3": xxhash.xxh3_64_hexdigest(_bytes(tensor))}
                for name, tensor in tensors.items()
            ]
            for file in parsed["files"]:
                if file["name"] == SKELETON:
                    file["size_bytes"] = len(data)
                    file["sha256"] = hashlib.sha256(data).hexdigest()
            if also is not None:
                also(parsed)

        json_changed(seal)(folder / MANIFEST)

    return damage


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def put(name: str, value: torch.Tensor | float) -> Callable[[Tensors], object]:
    """Set a tensor, or the first number of one."""

    def change(tensors: Tensors) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            tensors[name].view(-1)[0] = value

    return change


def without(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def linear(parsed: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(x for x in parsed["skeleton_linears"] if x["parameter"] == name)
    return found


def renamed(parsed: dict[str, Any]) -> None:
    linear(parsed, Q)["parameter"] = "model.layers.1.self_attn.nothing.weight"


def renamed_tensors(tensors: Tensors) -> None:
    for part in ("plane0", "plane1", "scales"):
        tensors[f"model.layers.1.self_attn.nothing.weight.{part}"] = tensors.pop(f"{Q}.{part}")


def router_as_codes(tensors: Tensors) -> None:
    stored = "model.layers.0.block_sparse_moe.gate.weight"
    tensors.pop(stored, None) if stored in tensors else tensors.pop(ROUTER)
    tensors[f"{ROUTER}.plane0"] = torch.zeros(16 * 64 // 4, dtype=torch.uint8)
    tensors[f"{ROUTER}.plane1"] = torch.zeros(16 * 64 // 4, dtype=torch.uint8)
    tensors[f"{ROUTER}.scales"] = torch.zeros(1, 1, 16, dtype=torch.float16)


def lists_router(parsed: dict[str, Any]) -> None:
    parsed["skeleton_linears"].append({"parameter": ROUTER, "n_outputs": 8, "n_inputs": 64})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    model = make_tiny_checkpoint("mixtral", folder / "model", dtype="bfloat16")
    located = LocatedModel(folder=model, name="tiny")
    pack_bundle(located, out=folder / "bundle", bits="4", skeleton_bits="4")
    return folder / "bundle"


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "b" / "bundle"))


def load(folder: Path) -> None:
    with BundleReader.open(folder) as reader, reader.open_skeleton() as skeleton:
        manifest = reader.manifest
        SkeletonLoader(
            folder,
            skeleton,
            shape=manifest.shape,
            precision=manifest.skeleton_precision,
            linears=manifest.skeleton_linears,
        ).load()


def test_a_whole_skeleton_loads(bundle: Path) -> None:
    load(bundle)
    forged(lambda tensors: None)(bundle)  # the forger's own hand leaves no trace
    load(bundle)


@cases(
    Case(
        name="short plane",
        damage=forged(put(PLANE, torch.zeros(1023, dtype=torch.uint8))),
        says="plane0' is U8 [1023], wanted U8 [1024]",
    ),
    Case(
        name="plane of another dtype",
        damage=forged(put(PLANE, torch.zeros(1024, dtype=torch.int8))),
        says="plane0' is I8 [1024], wanted U8 [1024]",
    ),
    Case(
        name="scales of another shape",
        damage=forged(put(SCALES, torch.zeros(1, 4, 16, dtype=torch.float16))),
        says="scales' is F16 [1, 4, 16], wanted F16 [4, 1, 16]",
    ),
    Case(
        name="scales of another dtype",
        damage=forged(put(SCALES, torch.zeros(4, 1, 16, dtype=torch.bfloat16))),
        says="scales' is BF16 [4, 1, 16], wanted F16",
    ),
    Case(name="NaN scale", damage=forged(put(SCALES, np.nan)), says="scales' holds NaN"),
    Case(name="infinite scale", damage=forged(put(SCALES, -np.inf)), says="scales' holds NaN"),
    Case(name="a plane missing", damage=forged(without(PLANE)), says="lacks 'model.layers.1"),
    Case(
        name="a plane too many",
        damage=forged(put(f"{Q}.plane2", torch.zeros(1024, dtype=torch.uint8))),
        says="plane2', which this model does not use",
    ),
    Case(
        name="codes that are not listed",
        damage=forged(lambda tensors: None, lambda p: p["skeleton_linears"].remove(linear(p, Q))),
        says="holds 'model.layers.1.self_attn.q_proj.weight.plane0', which",
    ),
    Case(
        name="a matrix missing",
        damage=forged(
            without(PLANE, f"{Q}.plane1", SCALES),
            lambda p: p["skeleton_linears"].remove(linear(p, Q)),
        ),
        says=f"lacks a tensor for {Q}",
    ),
    Case(
        name="a matrix stored twice",
        damage=forged(put(Q, torch.zeros(64, 64))),
        says="which it holds as floats too",
    ),
    Case(
        name="a matrix of no model",
        damage=forged(renamed_tensors, renamed),
        says="nothing.weight', which this model does not have",
    ),
    Case(
        name="a router as codes",
        damage=forged(router_as_codes, lists_router),
        says="gate.weight', which this model does not have, or not as codes",
    ),
    Case(
        name="another shape of as many codes",
        damage=forged(lambda t: None, lambda p: linear(p, Q).update(n_outputs=63)),
        says="q_proj.weight', of shape [63, 64], the model wants [64, 64]",
    ),
    Case(
        name="another width",
        damage=forged(lambda t: None, lambda p: p["skeleton_precision"].update(width_bits=8)),
        says=", wanted U8 [",
    ),
    Case(
        name="codes of a native skeleton",
        damage=forged(lambda t: None, lambda p: p.update(skeleton_precision={"kind": "native"})),
        says="a native skeleton stores no matrix as codes",
    ),
    Case(
        name="a matrix listed twice",
        damage=forged(
            lambda t: None, lambda p: p["skeleton_linears"].append(p["skeleton_linears"][0])
        ),
        says="listed twice",
    ),
    Case(
        name="an absurd shape",
        damage=forged(lambda t: None, lambda p: linear(p, Q).update(n_outputs=2**31)),
        says="n_outputs",
    ),
    Case(name="file cut", damage=in_file(SKELETON, cut(-1)), says=SKELETON),
    Case(name="a bit", damage=in_file(SKELETON, flip(-1)), says="the hash of"),
)
def test_a_damaged_skeleton(bundle: Path, case: Case) -> None:
    case.damage(bundle)
    require_refusal(case, bundle.parent, lambda: load(bundle))


@cases(Case(name="NaN scale", damage=forged(put(SCALES, np.nan)), says="scales' holds NaN"))
def test_the_full_check_finds_scales_that_are_no_numbers(bundle: Path, case: Case) -> None:
    def verify() -> None:
        with BundleReader.open(bundle) as reader:
            reader.verify_all()

    verify()
    case.damage(bundle)
    require_refusal(case, bundle.parent, verify)


def test_an_older_bundle_is_refused_with_the_command(bundle: Path) -> None:
    def older(parsed: dict[str, Any]) -> None:
        parsed["format_version"] = 1
        del parsed["skeleton_precision"], parsed["skeleton_linears"]

    json_changed(older)(bundle / MANIFEST)
    with pytest.raises(Exception, match=r"format version '1', wanted 3") as caught:
        BundleReader.open(bundle)
    assert type(caught.value).__name__ == "ArtifactVersionError"
    assert "moe-tool pack" in str(caught.value)
    assert json.loads((bundle / MANIFEST).read_text())["format_version"] == 1
