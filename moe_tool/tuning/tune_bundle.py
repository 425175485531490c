"""Tuning of a bundle's layers one after the other; finished layers are written at once."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.models.architecture import OpenedModel
from moe_tool.packing.expert_records import relative_error
from moe_tool.progress import Progress
from moe_tool.quantization.weights import ExpertWeights, FloatWeight
from moe_tool.text.sequences import TokenSequences
from moe_tool.tuning.copied_bundle import CopiedBundle
from moe_tool.tuning.paired_layers import PairedLayer, PairedModel
from moe_tool.tuning.tune_layer import (
    TunedExpert,
    begin_expert,
    layer_error,
    tune_layer,
    unpack_expert,
)
from moe_tool.tuning.tune_options import TuneOptions

_LEAST_ROWS = 32
"""Fewest routed tokens at which an expert is tuned"""
_MEASURED_TOKENS = 256
_LEAST_MEASURED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedLayer:
    """Outcome of one layer. Errors are relative errors of the experts' summed output on held-out
    tokens."""

    layer: int
    error_before: float
    error_after: float
    moved: float
    """Share of the codes that changed"""
    is_kept: bool
    """Whether the tuned codes are kept; False: tuning did not lower the error"""


class BundleTuner:
    """Tuner of one bundle, layer by layer."""

    def __init__(
        self, opened: OpenedModel, copied: CopiedBundle, options: TuneOptions, progress: Progress
    ) -> None:
        """Keep the checkpoint that the bundle was packed from, old and new bundle, and options."""
        self._opened = opened
        self._copied = copied
        self._options = options
        self._progress = progress
        self.layers: list[TunedLayer] = []
        self.untuned: list[ExpertKey] = []
        self.state_bytes = 0

    def run(self, folder: Path, sequences: TokenSequences) -> None:
        """Tune and write the missing layers; finished ones are read from the new bundle."""
        missing: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for form, at, expert in self._copied.writer.to_write:
            missing[at].append((form, expert))
        ids = torch.from_numpy(sequences.ids.astype(np.int64))
        paired = PairedModel(folder, self._opened, ids, torch.from_numpy(sequences.held_out))
        for layer in paired.layers(last=max(missing, default=-1)):
            number = layer.layer
            if number in missing:
                paired.go_on_with(self._tune(layer, missing[number]))
            else:
                stored = self._copied.experts(number)
                paired.go_on_with({e: self._copied.written_expert(number, e) for e in stored})

    def _tune(self, layer: PairedLayer, missing: list[tuple[int, int]]) -> dict[int, ExpertWeights]:
        """Tune a layer, write its records and return its new experts."""
        number, copied = layer.layer, self._copied
        stored = copied.experts(number)
        experts = {e: unpack_expert(copied.old_expert(number, e)) for e in stored}
        judged = torch.nonzero(layer.held_out).flatten()
        before = layer_error(layer.module, experts, layer.text, judged)
        moving = self._move(layer, experts)
        after = layer_error(layer.module, experts, layer.text, judged)
        is_kept = after < before
        records = {}
        n_moved = n_codes = 0
        for expert in stored:
            primary = copied.primary(number, expert)
            record = copied.old_record(primary.index, number, expert)
            if is_kept and expert in moving:
                old = unpack_expert(copied.decode(number, expert, record)).matrices
                new = experts[expert].matrices
                n_moved += sum(int((new[n].codes != old[n].codes).sum()) for n in old)
                n_codes += sum(matrix.codes.numel() for matrix in old.values())
                record = primary.form.encode(experts[expert].packed())
            records[expert] = record
            del experts[expert]
        self.layers.append(
            TunedLayer(
                layer=number,
                error_before=before,
                error_after=after if is_kept else before,
                moved=n_moved / max(1, n_codes),
                is_kept=is_kept,
            )
        )
        for form, expert in missing:
            if form == copied.primary(number, expert).index:
                error = self._error(layer, expert, records[expert])
                copied.writer.write_record(form, number, expert, records[expert], eps=error)
            else:
                copied.copy_replica(form, number, expert)
        return {e: copied.decode(number, e, record) for e, record in records.items()}

    def _move(self, layer: PairedLayer, experts: dict[int, TunedExpert]) -> set[int]:
        """Train the experts that can be tuned and return their ids."""
        number, options = layer.layer, self._options
        rows = torch.nonzero(~layer.held_out).flatten()
        wanted = torch.bincount(layer.text.index[rows].flatten(), minlength=max(experts) + 1)
        moving = set()
        for expert, each in experts.items():
            if not each.matrices:
                continue
            if int(wanted[expert]) < _LEAST_ROWS:
                self.untuned.append((number, expert))
                continue
            begin_expert(each, self._opened.experts.read(number, expert), options)
            moving.add(expert)
        self.state_bytes = max(self.state_bytes, sum(e.state_bytes for e in experts.values()))
        self._progress.begin(f"tune layer {number}", options.steps, "steps")
        if moving:
            tune_layer(
                layer.module,
                experts,
                layer.text,
                rows,
                options,
                seed=options.seed + number,
                on_step=self._progress.advance,
            )
        self._progress.end()
        for each in experts.values():
            each.states.clear()
        return moving

    def _error(self, layer: PairedLayer, expert: int, record: torch.Tensor) -> float:
        """Return the error of an expert's output on its inputs in the exact model."""
        if not self._copied.primary(layer.layer, expert).table.precision.is_coded:
            return 0.0
        own = torch.nonzero((layer.exact_index == expert).any(dim=1)).flatten()
        rows = own if len(own) >= _LEAST_MEASURED else torch.arange(len(layer.exact_inputs))
        x = layer.exact_inputs[rows[:: max(1, -(-len(rows) // _MEASURED_TOKENS))]]
        exact = {
            name: FloatWeight(values=value)
            for name, value in self._opened.experts.read(layer.layer, expert).items()
        }
        with torch.no_grad():
            found = expert_forward(
                layer.module, self._copied.decode(layer.layer, expert, record), x
            )
            return relative_error(expert_forward(layer.module, exact, x), found)
