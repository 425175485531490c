"""Skeleton of a bundle as the tensors that it stands for: codes of a checkpoint are decoded."""

import math
from collections.abc import Mapping

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_checks import REPACK, skeleton_parts
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.safetensors_index import Checkpoint, TensorInfo
from moe_tool.models.model_config import read_raw_config
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.models.stored_formats.registry import read_as_declared


def open_bundle_skeleton(bundle: BundleReader) -> Checkpoint:
    """Open a bundle's skeleton; the bundle's own config.json tells how a checkpoint's codes read.

    Raises:
        CorruptArtifactError: its tensors do not fit together.
        UnsupportedModelError: config.json names a format that is not read.
    """
    own = {part.name for part in skeleton_parts(bundle.manifest)}
    raw = bundle.open_skeleton()
    try:
        return read_as_declared(raw, bundle.folder, read_raw_config(bundle.folder), apart=own)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(
            f"the skeleton of {bundle.folder}: {error.message}", hint=REPACK
        ) from error


def bundle_loader(bundle: BundleReader, checkpoint: Checkpoint) -> SkeletonLoader:
    """Return the loader of a bundle's skeleton, opened by `open_bundle_skeleton`."""
    manifest = bundle.manifest
    return SkeletonLoader(
        bundle.folder,
        checkpoint,
        shape=manifest.shape,
        precision=manifest.skeleton_precision,
        linears=manifest.skeleton_linears,
    )


def n_skeleton_weights(bundle: BundleReader) -> int:
    """Return the number of the skeleton's weights, however they are stored."""
    parts = {part.name for part in skeleton_parts(bundle.manifest)}
    others = [info for name, info in _tensors(bundle).items() if name not in parts]
    coded = sum(linear.n_outputs * linear.n_inputs for linear in bundle.manifest.skeleton_linears)
    return coded + sum(math.prod(info.shape) for info in others)


def matrix_bytes(bundle: BundleReader) -> int:
    """Return the bytes of the loaded skeleton that a forward reads: all but an embedding that is
    not also the head, since a forward reads a row of it."""
    with open_bundle_skeleton(bundle) as checkpoint:
        sizes = {name: info.size_bytes for name, info in checkpoint.tensors.items()}
        sizes |= bundle_loader(bundle, checkpoint).kept_bytes
    embeddings = sum(size for name, size in sizes.items() if "embed" in name)
    is_tied = not any("lm_head" in name for name in sizes)
    return sum(sizes.values()) - (0 if is_tied else embeddings)


def _tensors(bundle: BundleReader) -> Mapping[str, TensorInfo]:
    with open_bundle_skeleton(bundle) as checkpoint:
        return checkpoint.tensors
