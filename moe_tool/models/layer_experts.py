"""Experts of one layer in memory: as floats, or in the codes of a quantized checkpoint."""

from collections.abc import Iterator, Mapping

from moe_tool.artifacts.moe_shape import FLOAT_SIZE_BYTES, MoeShape
from moe_tool.experts.linear import expanded
from moe_tool.models.expert_source import ExpertSource
from moe_tool.quantization.kept_codes import KeptWeight
from moe_tool.quantization.weights import FloatWeight

_DECODED_EXPERTS = 2
"""Experts in float32 beside the codes: one at work while the next is decoded"""


class LayerExperts(Mapping[int, Mapping[str, FloatWeight]]):
    """All experts of a layer by number, each in canonical form, see `ExpertSource.read`.

    Codes stay codes where all of the layer's experts can be kept so, and an expert is decoded
    whenever it is asked for: to the same numbers, in a quarter or an eighth of the memory.
    """

    def __init__(self, source: ExpertSource, shape: MoeShape, layer: int) -> None:
        """Read the experts.

        Raises:
            CorruptArtifactError: a number is NaN or infinite.
            StorageError: the checkpoint cannot be read.
        """
        keeps = source.kept_bytes(layer) is not None
        self._held = tuple(_read(source, layer, expert, keeps) for expert in range(shape.experts))

    def __getitem__(self, expert: int) -> Mapping[str, FloatWeight]:
        """Return an expert's tensors; a decoded one is new each time."""
        return {name: expanded(weight) for name, weight in self._held[expert].items()}

    def __iter__(self) -> Iterator[int]:
        """Iterate over the experts' numbers."""
        return iter(range(len(self._held)))

    def __len__(self) -> int:
        """Return the number of experts, E."""
        return len(self._held)


def layer_experts_bytes(source: ExpertSource, shape: MoeShape) -> int:
    """Return the most bytes that the experts of a layer take, with those decoded at a time.

    One expert is read of each group of layers that are stored alike.

    Raises:
        CorruptArtifactError, StorageError: as `LayerExperts`.
    """
    floats = shape.n_expert_weights * FLOAT_SIZE_BYTES[shape.dtype]
    found = []
    for layer in shape.layers:
        kept = source.kept_bytes(layer)
        if kept is None:
            found.append(shape.experts * floats)
        else:
            found.append(shape.experts * kept + _DECODED_EXPERTS * floats)
    return max(found)


def _read(
    source: ExpertSource, layer: int, expert: int, keeps: bool
) -> Mapping[str, FloatWeight | KeptWeight]:
    kept = source.read_kept(layer, expert) if keeps else None
    if kept is not None:
        return kept
    return {name: FloatWeight(values=v) for name, v in source.read(layer, expert).items()}
