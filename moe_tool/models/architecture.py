"""Opening of a checkpoint: shape, identity, and sources of skeleton and experts."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import ExpertTensor, FloatName, MoeShape
from moe_tool.artifacts.precision import KeptPrecision
from moe_tool.errors import CorruptArtifactError, UnsupportedModelError
from moe_tool.formats.discarded_source import DiscardedSource
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.models.checkpoint_identity import checkpoint_identity
from moe_tool.models.context_length import context_length
from moe_tool.models.expert_source import ExpertSource, expert_dtype, is_transposed
from moe_tool.models.locate import LocatedModel
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.model_config import read_raw_config
from moe_tool.models.moe_layers import (
    MoeLayerModules,
    decoder_layers,
    expert_parameters,
    find_moe_layers,
    top_k,
)
from moe_tool.models.mole.load_mole import is_mole
from moe_tool.models.skeleton_source import SkeletonSource
from moe_tool.models.stored_formats.registry import (
    headers_tell_all,
    open_checkpoint,
    read_as_declared,
)
from moe_tool.models.tensor_map import TensorMap
from moe_tool.models.unused_tensors import warnings_of

UNFUSED_ATTENTION = frozenset({"gpt_oss"})
"""Model types whose attention transformers computes step by step, score matrix included"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A checkpoint, checked against its config, ready to be read."""

    checkpoint: Checkpoint
    """Open checkpoint; the owner of this object closes it."""
    identity: ModelIdentity
    shape: MoeShape
    skeleton: SkeletonSource
    """Everything but the routed experts."""
    experts: ExpertSource
    max_positions: int
    """Context length of the model; a large number if unknown"""
    unfused_attention_heads: int
    """Query heads whose score matrices are in memory in full; 0 with a fused kernel"""
    decode_bytes: int
    """Most bytes that decoding one tensor holds beside the result; 0 if none is stored as codes"""
    warnings: tuple[str, ...]
    """A sentence for each thing in the folder that has no effect"""
    gone: DiscardedSource | None = None
    """State of an interrupted pack that deleted shards"""

    @property
    def format_name(self) -> str:
        """Name of the format of quantized weights, or dtype of the experts"""
        return self.checkpoint.format_name or self.shape.dtype

    def kept_precision(self) -> KeptPrecision | None:
        """Return the precision of the experts' codes on disk; see `ExpertSource.kept_precision`."""
        return self.experts.kept_precision() if self.gone is None else self.gone.state.kept


def open_model(model: LocatedModel) -> OpenedModel:
    """Open a checkpoint and check its headers against config.json before any weight is read.

    Raises:
        NotFoundError: there is no config.json or no checkpoint.
        UnsupportedModelError: the architecture or the weight format is unknown, or its experts are
            looked up and not routed to.
        CorruptArtifactError: config or tensors are damaged or do not belong together.
    """
    if is_mole(model.folder):
        raise UnsupportedModelError(
            f"{model.name} is a mixture of lookup experts: every token uses every expert, so that "
            "there is no routing to profile, to plan or to answer misses of",
            hint=f"moe-tool pack {model.folder} writes its experts as rows, which run looks up",
        )
    meta = build_meta_model(model.folder)
    gone, config = model.gone, read_raw_config(model.folder)
    if gone is None:
        checkpoint = open_checkpoint(model.folder, config)
    else:
        checkpoint = read_as_declared(gone.open_checkpoint(model.folder), model.folder, config)
    try:
        tensor_map, unused, experts, shape = _check(meta, checkpoint)
        if gone is None:
            identity = checkpoint_identity(
                model.folder,
                checkpoint,
                name=model.name,
                model_type=shape.model_type,
                hashed_tensors=identity_tensor_names(meta, checkpoint),
            )
        else:
            identity = gone.state.identity.model_copy(update={"name": model.name})
    except BaseException:
        checkpoint.close()
        raise
    return OpenedModel(
        checkpoint=checkpoint,
        identity=identity,
        shape=shape,
        skeleton=SkeletonSource(meta, tensor_map, checkpoint),
        experts=experts,
        max_positions=context_length(meta.config.get_text_config()) or 2**30,
        unfused_attention_heads=_unfused_attention_heads(meta),
        decode_bytes=max(checkpoint.extra_bytes(name) for name in checkpoint.tensors),
        warnings=(*checkpoint.remarks, *warnings_of(model.folder, unused)),
        gone=gone,
    )


def check_headers(folder: Path, checkpoint: Checkpoint) -> None:
    """Compare the headers of a checkpoint with the config.json of a folder; no weight is read.

    Raises:
        NotFoundError, UnsupportedModelError, CorruptArtifactError: as `open_model`.
    """
    config = read_raw_config(folder)
    if headers_tell_all(folder, config):
        _check(build_meta_model(folder), read_as_declared(checkpoint, folder, config))


def _check(
    meta: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[TensorMap, tuple[str, ...], ExpertSource, MoeShape]:
    _require_merged(checkpoint)
    tensor_map = TensorMap(meta, checkpoint)
    unused = tensor_map.find_unused()
    experts = ExpertSource(meta, checkpoint)
    tensor_map.check_skeleton()
    return tensor_map, unused, experts, read_shape(meta, checkpoint)


def _require_merged(checkpoint: Checkpoint) -> None:
    """Refuse tensors with the names of an adapter wrapper, which the model would not find."""
    for name in checkpoint.tensors:
        if name.startswith("base_model.") or ".base_layer." in name:
            raise UnsupportedModelError(
                f"the checkpoint was saved with an adapter around it, as {quoted(name)} says",
                hint="merge it, with peft's merge_and_unload and save_pretrained, and give the "
                "folder of that",
            )


def _unfused_attention_heads(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(config.num_attention_heads) if config.model_type in UNFUSED_ATTENTION else 0


def read_shape(model: PreTrainedModel, checkpoint: Checkpoint) -> MoeShape:
    """Return the shape of a model, from its modules and the dtype of the experts on disk.

    Args:
        model: a model on the meta device, with the experts' parameters.
        checkpoint: a whole checkpoint.

    Raises:
        UnsupportedModelError: the experts are not stored as floats.
        CorruptArtifactError: the checkpoint holds no experts.
    """
    modules = find_moe_layers(model)[0]
    return structure(model, modules, dtype=expert_dtype(TensorMap(model, checkpoint), checkpoint))


def structure(model: PreTrainedModel, modules: MoeLayerModules, *, dtype: FloatName) -> MoeShape:
    """Return the shape of a model from one of its MoE layers and the experts' dtype on disk.

    Raises:
        CorruptArtifactError: config.json describes a shape, or groups, that no router can have.
    """
    config = model.config.get_text_config()
    _require_groups(config, modules)
    try:
        return MoeShape(
            model_type=model.config.model_type,
            n_decoder_layers=len(decoder_layers(model)),
            layers=tuple(found.layer for found in find_moe_layers(model)),
            experts=cast(int, modules.experts.num_experts),
            top_k=top_k(modules),
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            dtype=dtype,
            expert_tensors=_expert_tensors(modules),
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise CorruptArtifactError(
            f"config.json describes no mixture of experts: {where + ': ' if where else ''}{reason}",
            hint="download the checkpoint again",
        ) from error


def _require_groups(config: PreTrainedConfig, modules: MoeLayerModules) -> None:
    """Refuse groups of experts that the router cannot compute.

    Some routers ignore the groups in their configuration, so the router is run, on the meta device,
    which computes shapes only.
    """
    groups, experts = getattr(config, "n_group", None), cast(int, modules.experts.num_experts)
    if not isinstance(groups, int) or groups == 1:
        return
    weight = next(modules.router.parameters())
    try:
        modules.route(torch.zeros(1, config.hidden_size, device=weight.device, dtype=weight.dtype))
    except Exception as error:  # torch and the routers raise many kinds of errors
        chosen = getattr(config, "topk_group", None)
        raise CorruptArtifactError(
            f"config.json describes no mixture of experts: {experts} experts cannot be routed in "
            f"{groups} groups (n_group) of which {chosen} are chosen (topk_group)",
            hint="n_group has to divide the number of experts into groups of two or more; a "
            "pruned checkpoint needs groups that fit what is left, e.g. n_group 1 and topk_group 1",
        ) from error


def identity_tensor_names(model: PreTrainedModel, checkpoint: Checkpoint) -> list[str]:
    """Return the on-disk names of routers and of vectors outside experts.

    They are small, and every fine-tune changes them.

    Args:
        model: a model on the meta device, with the experts' parameters.
        checkpoint: a whole checkpoint, or one without routed experts.
    """
    tensor_map = TensorMap(model, checkpoint)
    module_names = {module: name for name, module in model.named_modules()}
    routers = tuple(f"{module_names[m.router]}." for m in tensor_map.moe_layers.values())
    chosen = set()
    for target, pieces in tensor_map.skeleton.items():
        for piece in pieces:
            if target.startswith(routers) or len(checkpoint.tensors[piece.name].shape) == 1:
                chosen.add(piece.name)
    return sorted(chosen)


def _expert_tensors(modules: MoeLayerModules) -> tuple[ExpertTensor, ...]:
    tensors = []
    for name, shape in expert_parameters(modules).items():
        own = shape[:0:-1] if is_transposed(modules) and len(shape) == 3 else shape[1:]
        tensors.append(ExpertTensor(name=name, shape=own))
    return tuple(tensors)
