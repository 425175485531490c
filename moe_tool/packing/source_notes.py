"""Sentences on a checkpoint's format and what becomes of it, said before a bundle is written."""

from collections.abc import Iterator
from typing import Any

from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.budget.sizes import format_bytes
from moe_tool.formats.bundle_spec import BundleSpec
from moe_tool.models.architecture import OpenedModel

_DECODED = (
    "native: the codes of these experts cannot be kept as they are (the kernels do not know their "
    "format, or experts differ in it), so they are written as float32, four times --bits 8"
)


def source_notes(opened: OpenedModel, spec: BundleSpec) -> Iterator[str]:
    """Yield the format, what the experts become, and a warning if that saves nothing."""
    size = format_bytes(opened.checkpoint.total_bytes)
    primaries = [form.precision for form in spec.forms if form.role == "primary"]
    are_coded = opened.experts.are_coded
    done = " or ".join(_becomes(opened, precision, are_coded) for precision in primaries)
    where = ", in the checkpoint's files" if spec.placed else ""
    yield f"checkpoint: {opened.format_name}, {size}; experts: {done}{where}"
    if not are_coded:
        return
    if any(precision.kind == "native" for precision in primaries):
        yield _DECODED
    stored_bits = int(_stored_bits(opened))
    for precision in primaries:
        if precision.kind == "integer" and precision.width_bits >= stored_bits:
            yield (
                f"warning: codes of {stored_bits} bits are rounded again, to {precision.name} "
                "bits: that loses quality and saves nothing; --bits native keeps the codes of "
                "most formats"
            )


def tokenizer_notes(tokenizer: Any, vocabulary: int) -> Iterator[str]:
    """Yield a warning if a tokenizer makes tokens that the model does not know."""
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= vocabulary:
        yield (
            f"warning: the tokenizer makes tokens up to {last}, the model knows {vocabulary}: it "
            "belongs to another model, or tokens were added since; a text with them is refused"
        )


def _becomes(opened: OpenedModel, precision: AnyPrecision, are_coded: bool) -> str:
    first = "decoded and " if are_coded else ""
    if precision.kind == "kept":
        return f"codes kept ({precision.name})"
    if precision.kind == "native":
        return f"decoded to {opened.shape.dtype}" if are_coded else f"{opened.shape.dtype} kept"
    if precision.kind == "channels":
        return f"{first}rounded channel by channel ({precision.name})"
    return f"{first}rounded to {precision.name} bits"


def _stored_bits(opened: OpenedModel) -> float:
    """Return the bits on disk of a weight of the first expert, scales included."""
    shape, experts = opened.shape, opened.experts
    places = (experts.places(shape.layers[0], each.name, 0) for each in shape.expert_tensors)
    parts = {
        (part.file, part.offset): part.size_bytes
        for by_role in places
        for found in by_role.values()
        for part in found
    }
    return 8 * sum(parts.values()) / shape.n_expert_weights
