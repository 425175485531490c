"""Checks of a skeleton: its model's shape, and that nothing of it is missing."""

from transformers import PreTrainedModel

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.errors import WrongModelError
from moe_tool.models.architecture import structure
from moe_tool.models.moe_layers import MoeLayerModules, unsupported


def require_shape(
    model: PreTrainedModel, layers: tuple[MoeLayerModules, ...], wanted: MoeShape
) -> MoeShape:
    """Return the shape of a model.

    Raises:
        WrongModelError: it is not the wanted one.
    """
    found = structure(model, layers[0], dtype=wanted.dtype)
    if found != wanted:
        fields = [
            name for name in MoeShape.model_fields if getattr(found, name) != getattr(wanted, name)
        ]
        name = fields[0]
        raise WrongModelError(
            f"config.json has {name} {getattr(found, name)}, "
            f"the experts were made for {getattr(wanted, name)}",
            hint="use the config.json that was packed with the experts",
        )
    return wanted


def require_loaded(model: PreTrainedModel) -> None:
    """Refuse a model with parameters or buffers that were not loaded.

    Raises:
        UnsupportedModelError: names the first.
    """
    for kind in (model.named_parameters(), model.named_buffers()):
        for name, tensor in kind:
            if tensor.is_meta:
                raise unsupported(model.config.model_type, f"{name} is in no checkpoint")
