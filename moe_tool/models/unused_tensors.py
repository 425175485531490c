"""Account of a checkpoint's tensors: codes are no weights, and what nothing uses is named."""

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from transformers import PreTrainedModel

from moe_tool.errors import UnsupportedModelError
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.moe_layers import decoder_layers, decoder_prefix

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
_N_NAMED = 3
_CODES = {
    "I8": "int8, as in bitsandbytes",
    "U8": "MXFP4, NVFP4 or bitsandbytes",
    "I32": "GPTQ, AWQ or compressed-tensors",
    "U32": "MLX",
}
_RESTORE = (
    "copy config.json with its quantization_config from where the checkpoint was published, or use "
    "a float32, bfloat16 or float16 version"
)
_FAULTS = (
    (
        re.compile(r"lora_|base_layer"),
        "an adapter that is not merged into the weights",
        ("merge it, with peft's merge_and_unload and save_pretrained, and give the folder of that"),
    ),
    (
        re.compile(r"\.SCB$|scale|\.(absmax|quant_map|quant_state\b.*|qzeros)$"),
        "weights stored as codes, which nothing says how to read",
        (_RESTORE),
    ),
)
"""Names of tensors that change what others mean, what they belong to, and the remedy"""
_NO_PART = re.compile(r"(^|\.)(mtp|nextn|\w*(visual|vision|audio|image|multi_modal)\w*)\.")
"""Parts of a checkpoint that its language model does not have"""
_HARMLESS = re.compile(
    r"(rotary\w*\.|inv_freq|cos_cached|sin_cached|masked_bias|attn\.bias|position_ids|"
    r"num_batches_tracked|\.(q|k|v|kv|prob)_scale)$|rotary_emb\."
)
"""Caches that every model computes itself"""
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")


def require_float(info: TensorInfo) -> None:
    """Refuse codes where a weight is wanted: a cast would make numbers without meaning of them."""
    if info.dtype not in FLOATS:
        kind = "FP8" if info.dtype.startswith("F8") else _CODES.get(info.dtype)
        codes = "" if kind is None else f", codes of {kind}"
        raise UnsupportedModelError(
            f"{info.file}: tensor {quoted(info.name)} is stored as {info.dtype}{codes}, and no "
            "quantization settings say how it is read",
            hint=_RESTORE,
        )


def find_unused(model: PreTrainedModel, targets: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of tensors that belong to modules of the model, which does not use them.

    Args:
        model: the model.
        targets: name on disk -> name in the model, of all tensors that nothing uses.

    Raises:
        UnsupportedModelError: without one of them, other tensors mean something else.
    """
    n_layers, layers = len(decoder_layers(model)), decoder_prefix(model)
    modules = {name for name, _ in model.named_modules()}
    found = []
    for name, target in targets.items():
        layer = _LAYER.search(name)
        is_beyond = layer is not None and int(layer.group(1)) >= n_layers
        if is_beyond or _NO_PART.search(name) or _HARMLESS.search(name):
            continue
        for pattern, what, remedy in _FAULTS:
            if pattern.search(name):
                raise UnsupportedModelError(
                    f"the checkpoint holds {quoted(name)}, a part of {what}", hint=remedy
                )
        owner = _owner(modules, target)
        if owner and not layers.startswith(f"{owner}."):
            found.append(name)
    return tuple(found)


def warnings_of(folder: Path, unused: Sequence[str]) -> tuple[str, ...]:
    """Return one sentence for each thing in a checkpoint that will have no effect."""
    found = []
    if unused:
        found.append(f"the model has no place for {_list(unused)}: left out")
    adapter = next((name for name in _ADAPTERS if (folder / name).is_file()), None)
    if adapter is not None:
        found.append(f"{folder / adapter} belongs to an adapter, which is not applied")
    return tuple(found)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _N_NAMED} more tensors" if len(names) > _N_NAMED else ""
    return ", ".join(quoted(name) for name in names[:_N_NAMED]) + more


def _owner(modules: Set[str], target: str) -> str:
    """Return the innermost module of the model that a name lies in; "" if none."""
    owner = target
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner
