"""One pass of all tokens through all decoder layers, one layer in memory at a time."""

from pathlib import Path

import numpy as np
import torch

from moe_tool.budget.sizes import format_bytes
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.profile_hdf5 import ProfileHeader, write_layer_part, write_profile
from moe_tool.formats.tensor_stream import stream_tensor
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.full_hash import FullHash
from moe_tool.models.layer_stream import LayerStream, StreamedLayer
from moe_tool.models.output_divergence import total_divergence
from moe_tool.profiling.hidden_states import HiddenStates
from moe_tool.profiling.layer_pass import RELATIVE_NOISE, LayerPass
from moe_tool.profiling.parts_folder import PartsFolder
from moe_tool.profiling.profile_memory import LOGIT_ROWS, plan_profile_memory
from moe_tool.progress import Progress
from moe_tool.text.sequences import TokenSequences

PROBE_TOKENS = 1024
"""Tokens per layer on which all experts are evaluated, in-sample and held-out together."""
SENSITIVITY_SEQUENCES = 2
SENSITIVITY_TOKENS = 128
"""Tokens of each sequence on which sensitivities are measured."""


class ProfilePass:
    """Rows of hidden states: all tokens, then the watched sequences once untouched and once per MoE
    layer whose output was disturbed, from which sensitivities follow."""

    def __init__(
        self,
        opened: OpenedModel,
        folder: Path,
        sequences: TokenSequences,
        parts: PartsFolder,
        memory_bytes: int | None,
        progress: Progress,
    ) -> None:
        self._opened = opened
        self._sequences = sequences
        self._parts = parts
        self._progress = progress
        self._full_hash = FullHash(parts.digests())
        opened.checkpoint.on_read = self._full_hash.add
        self._stream = LayerStream(folder, opened.checkpoint)
        for table in self._stream.on_disk.values():  # the hash is of all tensors
            for info in table.parts:
                pieces = stream_tensor(info, requires_finite=True)
                self._full_hash.add_streamed(info.name, pieces)
        self._watched = _watched_sequences(sequences)  # [b, s] int64
        n_tokens, n_watched = sequences.ids.size, self._watched.size
        n_rows = n_tokens + n_watched * (1 + len(opened.shape.layers))
        width = max(self._stream.flow(ids.shape[1]).width for ids in (sequences.ids, self._watched))
        self.plan = plan_profile_memory(
            opened,
            n_rows=n_rows,
            width=width,
            n_tokens=n_tokens,
            seq_len=sequences.ids.shape[1],
            asked=memory_bytes,
        )
        hidden_bytes = n_rows * width * 4
        require_free_disk(parts.folder, 2 * hidden_bytes)
        note = f"hidden states: 2 x {format_bytes(hidden_bytes)} in {parts.folder}"
        if not self.plan.hidden_in_memory:
            note += ", worked on there: they exceed a quarter of the budget"
        progress.note(note)
        self._states = HiddenStates(
            parts.folder, n_rows=n_rows, hidden=width, in_memory=self.plan.hidden_in_memory
        )
        self._pass = LayerPass(
            opened,
            self._stream,
            sequences,
            sample_rows=_sample_rows(sequences),
            probe_bytes=self.plan.probe_bytes,
        )

    def record_layers(self, *, resume: bool) -> int:
        """Push all rows through every layer; return the decoder layer that it began with."""
        first = self._states.restore() if resume else None
        shape = self._opened.shape
        if first is None or not all(
            self._parts.layer_file(layer).is_file() for layer in shape.layers if layer < first
        ):
            first = 0
            self._embed()
        elif first > 0:
            self._progress.note(f"resuming at layer {first} of {shape.n_decoder_layers}")
        for layer in self._stream.layers(start=first):
            self._progress.begin(
                f"layer {layer.layer + 1}/{shape.n_decoder_layers}",
                self._sequences.ids.size,
                "tokens",
            )
            self._run_layer(layer)
            self._progress.end()
            self._parts.keep_digests(self._full_hash.digests)
            self._states.commit(layer.layer + 1)
        return first

    def write(self, out: Path, header: ProfileHeader) -> None:
        """Merge the layers' parts, with their sensitivities, into a profile."""
        identity = header.identity.model_copy(update={"full": self._full_hash.result()})
        write_profile(
            out,
            header.model_copy(update={"identity": identity}),
            self._sequences,
            {layer: self._parts.layer_file(layer) for layer in self._opened.shape.layers},
            self._sensitivities(),
            sensitivity_n_tokens=self._watched.size,
        )

    @torch.no_grad()
    def _sensitivities(self) -> dict[int, float]:
        """Return each MoE layer's sensitivity: KL in nats per squared relative error of its output.

        It is measured on the disturbed copies of the watched sequences; for small errors KL is
        quadratic in the error.
        """
        layers, n_watched = self._opened.shape.layers, self._watched.size
        base = self._sequences.ids.size
        total = dict.fromkeys(layers, 0.0)
        for first in range(0, n_watched, LOGIT_ROWS):
            n_rows = min(LOGIT_ROWS, n_watched - first)
            exact = self._logits(base + first, n_rows)  # [rows, V]
            for position, layer in enumerate(layers):
                row = base + (1 + position) * n_watched + first
                total[layer] += total_divergence(exact, self._logits(row, n_rows))
        self._states.close()
        return {layer: max(total[layer] / n_watched, 0.0) / RELATIVE_NOISE**2 for layer in layers}

    def _logits(self, first_row: int, n_rows: int) -> torch.Tensor:
        hidden = self._states.read(first_row, first_row + n_rows)
        return self._stream.logits(hidden[None])[0]

    def _embed(self) -> None:
        row = 0
        for ids in self._batches():
            hidden = self._stream.initial_hidden(ids)
            self._states.write(row, hidden.reshape(ids.numel(), -1))
            row += ids.numel()
        watched = self._stream.initial_hidden(torch.from_numpy(self._watched))
        self._states.write(row, watched.reshape(self._watched.size, -1))
        self._states.commit(0)

    def _run_layer(self, layer: StreamedLayer) -> None:
        self._pass.begin(layer)
        row = 0
        for ids in self._batches():
            hidden = self._states.read(row, row + ids.numel()).view(*ids.shape, -1)
            output = self._pass.forward(hidden, first_row=row)
            self._states.write(row, output.reshape(ids.numel(), -1))
            row += ids.numel()
            self._progress.advance(ids.numel())
        self._run_watched(layer, row)
        if layer.moe is not None:
            trace, statistics = self._pass.measure()
            write_layer_part(self._parts.layer_file(layer.layer), layer.layer, trace, statistics)

    def _run_watched(self, layer: StreamedLayer, base: int) -> None:
        """Push the watched sequences' copies through; disturb one more after a MoE layer."""
        n_watched = self._watched.size
        n_before = sum(before < layer.layer for before in self._opened.shape.layers)
        shape = (*self._watched.shape, -1)
        untouched = self._states.read(base, base + n_watched).view(*shape)
        if layer.moe is not None:
            disturbed = self._pass.forward(untouched, disturbed=True)
            row = base + (1 + n_before) * n_watched
            self._states.write(row, disturbed.reshape(n_watched, -1))
        n_copies = 1 + n_before
        at_once = max(
            1, self.plan.batch_sequences * self._sequences.ids.shape[1] // max(n_watched, 1)
        )
        for first in range(0, n_copies, at_once):
            n_rows = min(at_once, n_copies - first) * n_watched
            row = base + first * n_watched
            states = self._states.read(row, row + n_rows)  # [rows, W]
            hidden = states.view(-1, self._watched.shape[1], states.shape[1])
            self._states.write(row, self._pass.forward(hidden).reshape(n_rows, -1))

    def _batches(self) -> list[torch.Tensor]:
        ids = torch.from_numpy(self._sequences.ids.astype(np.int64))
        size = self.plan.batch_sequences
        return [ids[first : first + size] for first in range(0, len(ids), size)]


def _sample_rows(sequences: TokenSequences) -> np.ndarray:
    """Rows (tokens) of the probe, ascending: three quarters in-sample, one quarter held-out where
    there is one."""
    generator = np.random.default_rng([sequences.seed, 1])
    held_out = np.repeat(sequences.held_out, sequences.ids.shape[1])
    n_held_out = min(PROBE_TOKENS // 4, int(held_out.sum()))
    chosen = [
        generator.choice(np.flatnonzero(part), min(count, int(part.sum())), replace=False)
        for part, count in ((~held_out, PROBE_TOKENS - n_held_out), (held_out, n_held_out))
    ]
    return np.sort(np.concatenate(chosen))


def _watched_sequences(sequences: TokenSequences) -> np.ndarray:
    """[b, s] int64: the beginnings of a few in-sample sequences, on which sensitivity is
    measured."""
    generator = np.random.default_rng([sequences.seed, 2])
    candidates = np.flatnonzero(~sequences.held_out)
    count = min(SENSITIVITY_SEQUENCES, len(candidates))
    chosen = np.sort(generator.choice(candidates, count, replace=False))
    return sequences.ids[chosen, :SENSITIVITY_TOKENS].astype(np.int64)
