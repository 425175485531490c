"""Model without weights, built from config.json, with replaceable experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_tool.models.foreign_experts import adapt_experts
from moe_tool.models.model_config import bad_config, read_config
from moe_tool.models.moe_layers import find_moe_layers
from moe_tool.models.text_part import keep_text_part

EXPERTS_IMPLEMENTATION = "moe_tool"
CALL_ATTRIBUTE = "_moe_tool_call"
"""Attribute of an experts module with the callable that computes its output"""


def build_meta_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the model of a folder's config.json on the meta device, in eval mode.

    Its experts modules call their `CALL_ATTRIBUTE`. Of a model that sees or hears, only the part
    that predicts text has parameters.

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
            model: PreTrainedModel = _auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=False
            )
    except (
        Exception
    ) as error:  # any layer's constructor may fail on a value that fits the type only
        raise bad_config(folder / "config.json", error) from error
    model.eval()  # type: ignore[no-untyped-call]
    adapt_experts(model)
    for modules in find_moe_layers(model):
        of_experts: Any = modules.experts.config
        of_experts._experts_implementation_internal = EXPERTS_IMPLEMENTATION
    keep_text_part(model)
    return model


def _auto_class(config: PreTrainedConfig) -> Any:
    """Return the class that builds a configuration's model with a head over the vocabulary."""
    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    found = (kind for kind in kinds if type(config) in kind._model_mapping)
    return next(found, AutoModelForMultimodalLM)


def _answer(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    call: Callable[..., torch.Tensor] | None = module.__dict__.get(CALL_ATTRIBUTE)
    assert call is not None, "no experts function was set"
    return call(hidden_states, top_k_index, top_k_weights)
