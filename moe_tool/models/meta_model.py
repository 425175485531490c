"""A model without weights, built from config.json, whose experts are ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_tool.errors import CorruptArtifactError, NotFoundError, UnsupportedModelError
from moe_tool.models.moe_layers import find_moe_layers, unsupported

EXPERTS_IMPLEMENTATION = "moe_tool"
CALL_ATTRIBUTE = "_moe_tool_call"
"""Where an experts module keeps the callable that answers for it: a plain attribute."""

_MAX_CONFIG_BYTES = 4 * 2**20
# Twenty times more than any model has; building modules for a damaged number would take hours.
_MAX_LAYERS = 4096
_COUNTS = (
    "max_position_embeddings",
    "sliding_window",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_local_experts",
)


def read_config(folder: Path) -> PreTrainedConfig:
    """Read config.json of a causal language model; code that it names is never executed.

    Raises:
        NotFoundError: the folder has no config.json.
        CorruptArtifactError: it is not the configuration of a model.
        UnsupportedModelError: transformers has no causal language model of this type, or the
            weights are quantized.
    """
    raw = _read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CorruptArtifactError(
            f"{folder / 'config.json'} names no model_type",
            hint="use the folder of a checkpoint in Hugging Face format",
        )
    model_type = model_type[:64]
    if model_type not in CONFIG_MAPPING:
        reason = "transformers does not know it"
        if "auto_map" in raw:
            reason = "it needs Python code of its own, which is never executed"
        raise unsupported(model_type, reason)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unsupported(model_type, "it is not a causal language model")
    _refuse_quantized(model_type, raw)
    n_layers = raw.get("num_hidden_layers", 1)
    if not isinstance(n_layers, int) or not 1 <= n_layers <= _MAX_LAYERS:
        raise CorruptArtifactError(
            f"{folder / 'config.json'}: num_hidden_layers is {str(n_layers)[:32]}, "
            f"wanted 1 to {_MAX_LAYERS}",
            hint="download the checkpoint again",
        )
    _require_counts(folder / "config.json", raw)
    for key in ("auto_map", "num_labels", "id2label", "label2id"):
        raw.pop(key, None)  # code is never run, and labels are not for language models
    try:
        return CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # each configuration class refuses bad values with errors of its own
        raise _bad_config(folder, error) from error


def build_meta_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the model of a folder's config.json on the meta device, in eval mode.

    Its experts call what is set on them (`CALL_ATTRIBUTE`).

    Raises:
        NotFoundError, CorruptArtifactError: as `read_config`.
        UnsupportedModelError: as `read_config` and `find_moe_layers`.
    """
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _answer)
    config = read_config(folder)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False  # the hooks of the router collect them already
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (
        Exception
    ) as error:  # any layer's constructor may fail on a value that fits the type only
        raise _bad_config(folder, error) from error
    model.eval()  # type: ignore[no-untyped-call]
    find_moe_layers(model)
    try:
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    except ValueError as error:
        raise unsupported(config.model_type, "its experts cannot be replaced") from error
    return model


def _answer(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    call: Callable[..., torch.Tensor] | None = module.__dict__.get(CALL_ATTRIBUTE)
    assert call is not None, "no experts function was set"
    return call(hidden_states, top_k_index, top_k_weights)


def _read_json(path: Path) -> dict[str, Any]:
    hint = "use the folder of a checkpoint in Hugging Face format"
    if not path.is_file():
        raise NotFoundError(f"{path.parent} has no config.json", hint=hint)
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_CONFIG_BYTES:
        raise CorruptArtifactError(
            f"{path} has {size_bytes} bytes, wanted at most {_MAX_CONFIG_BYTES}", hint=hint
        )
    try:
        raw = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{path} is not JSON: {error}", hint=hint) from error
    if not isinstance(raw, dict):
        raise CorruptArtifactError(f"{path} is not a JSON object", hint=hint)
    return raw


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _require_counts(path: Path, raw: dict[str, Any]) -> None:
    """Refuse sizes that no model has before modules or masks are built from them."""
    for key in _COUNTS:
        value = raw.get(key)
        is_unused = key == "sliding_window" and raw.get("use_sliding_window") is False
        if value is None or is_unused:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise CorruptArtifactError(
                f"{path}: {key} is {str(value)[:32]}, wanted a whole number from 1 on",
                hint="download the checkpoint again",
            )


def _refuse_quantized(model_type: str, raw: dict[str, Any]) -> None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return
    method = (
        quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    )
    raise UnsupportedModelError(
        f"this {model_type} checkpoint is stored in {str(method)[:32]} format, which is not read",
        hint="use a float32, bfloat16 or float16 version of the checkpoint",
    )


def _bad_config(folder: Path, error: Exception) -> CorruptArtifactError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2])[:300] or type(error).__name__
    return CorruptArtifactError(
        f"{folder / 'config.json'} does not describe a model: {reason}",
        hint="download the checkpoint again",
    )
