"""A bundle of eight tiny experts, and everything that it is made of."""

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import NativePrecision, precision_from_bits
from moe_tool.formats.bundle_files import SkeletonEntry
from moe_tool.formats.bundle_spec import BundleSpec, planned_forms
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.packing.expert_coding import coded

IDENTITY = ModelIdentity(name="tiny", model_type="mixtral", quick="1" * 64)
SHAPE = MoeShape(
    model_type="mixtral",
    n_decoder_layers=4,
    layers=(1, 3),
    experts=4,
    top_k=2,
    hidden=72,
    vocabulary=11,
    dtype="bfloat16",
    expert_tensors=(
        ExpertTensor(name="gate_up_proj", shape=(10, 72)),
        ExpertTensor(name="gate_up_proj_bias", shape=(10,)),
        ExpertTensor(name="down_proj", shape=(72, 5)),
    ),
)
ORDER = [(layer, expert) for layer in SHAPE.layers for expert in (2, 0, 3, 1)]
MADE_FROM = {"bits": "4", "profile": "none"}
SKELETON = {"lm_head.weight": torch.arange(22.0).view(11, 2), "norm.weight": torch.ones(72)}


def expert_weights(layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Return the weights of one expert, in the checkpoint's dtype."""
    generator = torch.Generator().manual_seed(100 * layer + expert)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(torch.bfloat16)
        for tensor in SHAPE.expert_tensors
    }


def open_writer(
    out: Path,
    *,
    bits: str = "4",
    identity: ModelIdentity = IDENTITY,
    made_from: dict[str, str] = MADE_FROM,
    order: Sequence[tuple[int, int]] = ORDER,
) -> BundleWriter:
    """Begin the small bundle, or go on with it."""
    spec = BundleSpec(
        identity=identity,
        shape=SHAPE,
        order=tuple(order),
        forms=planned_forms({precision_from_bits(bits): order}),
        made_from=made_from,
    )
    return BundleWriter.open(out, spec)


def encoded(writer: BundleWriter, layer: int, expert: int) -> torch.Tensor:
    """Return the record of one expert."""
    weights = coded(expert_weights(layer, expert), writer.spec.forms[0].precision)
    return writer.forms[0].encode(weights)


def write_rest(writer: BundleWriter) -> None:
    """Write what is missing and finish."""
    if not writer.finished:
        for layer, expert in ORDER[writer.n_written :]:
            writer.write_record(0, layer, expert, encoded(writer, layer, expert))
        writer.suspend()
        infos = [
            SkeletonEntry(
                name=name, dtype="F32", shape=tuple(tensor.shape), size_bytes=tensor.nbytes
            )
            for name, tensor in SKELETON.items()
        ]
        writer.write_skeleton(
            infos,
            lambda name: (SKELETON[name].numpy().tobytes(),),
            precision=NativePrecision(),
            linears=(),
        )
        writer.add_file("config.json", b'{"model_type": "mixtral"}')
    writer.finish(heat=None, buddies=None, profile_sha256=None)


def write_bundle(out: Path, *, bits: str = "4") -> Path:
    """Write the small bundle."""
    write_rest(open_writer(out, bits=bits))
    return out


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
