"""Safetensors file of a bundle's trained mask routers."""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import BundleFile, BundleManifest
from moe_tool.artifacts.bundle_sections import (
    MASK_ROUTER,
    MASK_ROUTER_FILE,
    LearnedPruning,
    Section,
)
from moe_tool.artifacts.mask_router import (
    MASK_ROUTER_PARTS,
    LayerMaskRouter,
    MaskRouter,
    mask_router_shapes,
)
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.atomic_write import atomic_write_bytes, storage_errors
from moe_tool.formats.bundle_files import MANIFEST, safetensors_file
from moe_tool.formats.exact_tensors import read_exactly
from moe_tool.formats.hostile_file import read_capped
from moe_tool.formats.json_artifact import write_json_artifact

MASK_ROUTER_NAME = re.compile(MASK_ROUTER_FILE)
"""Names of mask-router files, made from a hash of the content: a new file never replaces an old
one. One that the manifest does not list is left over from an interrupted write."""


def write_mask_router(
    folder: Path, manifest: BundleManifest, router: MaskRouter, learned: LearnedPruning
) -> BundleManifest:
    """Put trained routers into a bundle, replacing earlier ones.

    The file is written first and the manifest last; until then the bundle is unchanged.

    Args:
        learned: entry for the manifest; its `file` is set here.

    Returns:
        The new manifest.

    Raises:
        DiskFullError, StorageError: a file cannot be written.
    """
    data = _encode(manifest.shape, router)
    digest = hashlib.sha256(data).hexdigest()
    name = f"pruning-{digest[:16]}.safetensors"
    atomic_write_bytes(folder / name, data)
    kept = [file for file in manifest.files if not MASK_ROUTER_NAME.fullmatch(file.name)]
    entry = BundleFile(name=name, size_bytes=len(data), sha256=digest)
    body = learned.model_copy(update={"file": name}).model_dump(mode="json")
    sections = manifest.sections | {MASK_ROUTER: Section(required=False, body=body)}
    written = manifest.model_copy(update={"files": (*kept, entry), "sections": sections})
    write_json_artifact(folder / MANIFEST, written)
    with storage_errors(folder):
        for path in folder.iterdir():
            if MASK_ROUTER_NAME.fullmatch(path.name) and path.name != name:
                path.unlink()
    return written


def read_mask_router(folder: Path, manifest: BundleManifest) -> MaskRouter:
    """Return the trained routers of a bundle that has some.

    Raises:
        CorruptArtifactError: the file is damaged, not of this model's shape, or holds NaN or
            infinity.
        NotFoundError, StorageError: it cannot be read.
    """
    pruning = manifest.pruning
    assert pruning is not None
    path = folder / pruning.file
    again = f"train it again with moe-tool tune pruning {folder}/ --data ..."
    entry = next(file for file in manifest.files if file.name == pruning.file)
    data = read_capped(path, limit_bytes=entry.size_bytes, remedy=again)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CorruptArtifactError(f"{path} is damaged: its sha256 does not fit", hint=again)
    wanted = {
        _name(layer, part): ("F32", extents)
        for layer in manifest.shape.layers
        for part, extents in mask_router_shapes(manifest.shape).items()
    }
    values = read_exactly(path, wanted, remedy=again)
    return {
        layer: LayerMaskRouter(
            **{part: values[_name(layer, part)].numpy() for part in MASK_ROUTER_PARTS}
        )
        for layer in manifest.shape.layers
    }


def _encode(shape: MoeShape, router: MaskRouter) -> bytes:
    extents = mask_router_shapes(shape)
    pieces: dict[str, torch.Tensor] = {}
    for layer in shape.layers:
        for part in MASK_ROUTER_PARTS:
            value = np.ascontiguousarray(getattr(router[layer], part), dtype="<f4")
            assert value.shape == extents[part]
            pieces[_name(layer, part)] = torch.from_numpy(value)
    return safetensors_file(pieces)


def _name(layer: int, part: str) -> str:
    return f"layer.{layer}.{part}"
