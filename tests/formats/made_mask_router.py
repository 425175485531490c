"""Mask routers that nobody trained, put into bundles of tiny models."""

from pathlib import Path

import numpy as np

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.bundle_sections import LearnedPruning, QualityFigure
from moe_tool.artifacts.mask_router import LayerMaskRouter, MaskRouter, mask_router_shapes
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.mask_router_file import write_mask_router

LEARNED = LearnedPruning(
    file=f"pruning-{0:016x}.safetensors",
    rate=0.2,
    offsets=tuple(np.linspace(-1.5, 1.5, 21)),
    penalty=0.01,
    quality=QualityFigure(kl=0.01, kl_ci95=(0.009, 0.011), tokens=64),
    tokens=512,
    seed=0,
    sources=("words=words.txt",),
)


def random_mask_router(shape: MoeShape, seed: int = 0) -> MaskRouter:
    """Return routers of normal numbers, of about the same say of each part."""
    rng = np.random.default_rng(seed)
    return {
        layer: LayerMaskRouter(
            **{
                name: (rng.normal(size=extents) / max(1, extents[-1]) ** 0.5).astype(np.float32)
                for name, extents in mask_router_shapes(shape).items()
            }
        )
        for layer in shape.layers
    }


def put_mask_router(folder: Path, seed: int = 0) -> BundleManifest:
    """Put random routers into a bundle."""
    with BundleReader.open(folder) as bundle:
        manifest = bundle.manifest
    return write_mask_router(folder, manifest, random_mask_router(manifest.shape, seed), LEARNED)
