"""Predictions of the checkpoint that a bundle was made from, streamed layer by layer."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.identity import require_same_model
from moe_tool.models.architecture import open_model
from moe_tool.models.layer_stream import LayerStream
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton import LayerCall
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import FloatWeight

_GROUP_BYTES = 256 * 2**20
_HIDDEN_COPIES = 20
"""Number of [T, H] tensors alive at once while a layer runs, inner activations included"""


class SourceModel:
    """Final hidden states of the evaluation text, and the head that turns them into predictions.

    One decoder layer's non-expert weights and one expert are in memory at a time; the hidden states
    (N * S * H * 4 bytes), the embeddings and the head stay.
    """

    def __init__(
        self,
        model: LocatedModel,
        manifest: BundleManifest,
        ids: torch.Tensor,
        *,
        progress: Progress = SILENT,
    ) -> None:
        """Push every sequence through the whole checkpoint.

        Args:
            manifest: manifest of the bundle.
            ids: [N, S] int64.

        Raises:
            WrongModelError: the bundle was made from another model.
            CorruptArtifactError, UnsupportedModelError, NotFoundError: as `open_model`.
        """
        opened = open_model(model)
        self._checkpoint = opened.checkpoint
        try:
            require_same_model(
                manifest.identity,
                opened.identity,
                artifact="the bundle",
                remedy="--reference needs the model that the bundle was packed from",
            )
            self._stream = LayerStream(model.folder, opened.checkpoint)
            self._stream.set_experts_function(self._answer)
            self._hidden = self._push(ids, progress)
        except BaseException:
            self._checkpoint.close()
            raise

    def logits(self, row: int) -> torch.Tensor:
        """Return the predictions of one sequence, [S, V]."""
        group, position = divmod(row, len(self._hidden[0]))
        return self._stream.logits(self._hidden[group][position : position + 1])[0]

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()

    def _push(self, ids: torch.Tensor, progress: Progress) -> list[torch.Tensor]:
        """Run groups of sequences through the layers; a layer's experts are read once per group."""
        bytes_per_sequence = _HIDDEN_COPIES * ids.shape[1] * self._stream.shape.hidden * 4
        groups = torch.split(ids, max(1, _GROUP_BYTES // bytes_per_sequence))
        hidden = [self._stream.initial_hidden(group) for group in groups]  # of [G, S, H]
        progress.begin("reference", self._stream.shape.n_decoder_layers, "layers")
        for layer in self._stream.layers():
            for index, states in enumerate(hidden):
                hidden[index] = layer.forward(states)
            progress.advance()
        progress.end()
        return hidden

    @torch.no_grad()
    def _answer(self, call: LayerCall) -> torch.Tensor:
        return call.run_experts(partial(self._supply, call.layer))

    def _supply(
        self, layer: int, experts: list[int]
    ) -> Iterator[tuple[int, Mapping[str, FloatWeight]]]:
        for expert in experts:
            tensors = self._stream.experts.read(layer, expert)
            yield expert, {name: FloatWeight(values=value) for name, value in tensors.items()}
