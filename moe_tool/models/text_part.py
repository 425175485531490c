"""Text part of a model that also sees or hears: what it computes with when given token ids only."""

from transformers import PreTrainedModel

from moe_tool.models.moe_layers import decoder

_LEFT_OUT = "_moe_tool_left_out"


def keep_text_part(model: PreTrainedModel) -> None:
    """Remove the parameters of a composite model's towers and projectors from its modules.

    Decoder and head stay. The modules stay too, because forward methods look at their settings.
    """
    left_out: set[str] = set()
    if model.config.get_text_config() is not model.config:
        text = decoder(model)
        kept = {*text.modules()}
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and text in part.modules():
                head = part.get_output_embeddings()  # type: ignore[no-untyped-call]
                kept |= {*head.modules()} if head is not None else set()
        for name, module in model.named_modules():
            if module in kept:
                continue
            prefix = f"{name}." if name else ""
            for held in (module._parameters, module._buffers):
                left_out.update(f"{prefix}{leaf}" for leaf in held)
                held.clear()
        tied = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {
            name: source for name, source in tied if not left_out & {name, source}
        }
    model.__dict__[_LEFT_OUT] = frozenset(left_out)


def left_out(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters and buffers that `keep_text_part` removed."""
    names: frozenset[str] = model.__dict__.get(_LEFT_OUT, frozenset())
    return names
