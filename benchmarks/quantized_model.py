"""A checkpoint's experts in other forms, and what these do to its answers. Products are torch's in
float32: what is judged are weights, not kernels. The model has to fit into memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import locate_model
from moe_tool.packing.calibrated_layers import CalibratedModel
from moe_tool.packing.pack_options import parse_precision
from moe_tool.packing.primary_forms import made_by
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import IntegerWeight
from moe_tool.quantizers.registry import QUANTIZERS

Matrices = Mapping[str, torch.Tensor]
"""Of one expert, by the module's names"""


def quantized(
    model: str, profile: Path, quantizer: Quantizer, forms: Iterable[str]
) -> dict[tuple[int, int, str], dict[str, torch.Tensor]]:
    """Return (layer, expert, bits as `pack --bits` takes them) -> its matrices, bfloat16; of nested
    bits the base too, with "base of " before its name."""
    located = locate_model(model, offline=True)
    opened = open_model(located)
    precisions = {bits: made_by(quantizer, parse_precision("--bits", bits)) for bits in forms}
    found = {}
    with opened.checkpoint, ProfileReader.open(profile) as reader, torch.no_grad():
        for layer in CalibratedModel(located.folder, opened, reader.tokens).layers():
            for expert in range(opened.shape.experts):
                sample = layer.sample(expert, most_measured=1)
                quantize_expert = QUANTIZERS[quantizer].make(sample.inputs)
                for bits, precision in precisions.items():
                    made = quantize_expert(sample.tensors, precision)
                    found[layer.layer, expert, bits] = _plain(made)
                    if precision.base is not None:
                        bases = {name: weight.base for name, weight in made.items()}
                        found[layer.layer, expert, f"base of {bits}"] = _plain(bases)
    return found


def _plain(made: Mapping[str, IntegerWeight]) -> dict[str, torch.Tensor]:
    return {name: dequantize(weight).bfloat16() for name, weight in made.items()}


class Judge:
    """The checkpoint, whole, and its answers to a text."""

    def __init__(self, model: str, text: Path, *, n_tokens: int, seq_len: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(locate_model(model, offline=True).folder)
        ids = tokenizer(text.read_text(encoding="utf-8")[: 8 * n_tokens])["input_ids"][:n_tokens]
        self._load(model, torch.tensor(ids[: len(ids) // seq_len * seq_len]).view(-1, seq_len))

    @classmethod
    def of_ids(cls, model: str, ids: torch.Tensor) -> "Judge":
        """Return the judge by token ids, [N, S] int64."""
        judge = cls.__new__(cls)
        judge._load(model, ids)
        return judge

    def _load(self, model: str, ids: torch.Tensor) -> None:
        self._ids = ids
        folder = locate_model(model, offline=True).folder
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._experts = {at: layer.mlp.experts for at, layer in enumerate(self._model.model.layers)}
        self._whole = {
            (at, name): getattr(module, name).detach().clone()
            for at, module in self._experts.items()
            for name in ("gate_up_proj", "down_proj")
        }
        self._truth = self._answers()

    def divergence(self, instead: Mapping[tuple[int, int], Matrices]) -> float:
        """Return the mean KL with some experts' matrices replaced."""
        return float(self.divergences(instead).mean())

    def divergences(self, instead: Mapping[tuple[int, int], Matrices]) -> torch.Tensor:
        """Return each sequence's mean KL with some experts' matrices replaced, [N]."""
        return self.losses(instead)[0]

    def losses(self, instead: Mapping[tuple[int, int], Matrices]) -> tuple[torch.Tensor, ...]:
        """Return each sequence's mean KL and mean negative log-likelihood, in nats, with some
        experts' matrices replaced, [N] each."""
        with torch.no_grad():
            for (at, name), whole in self._whole.items():
                weight = getattr(self._experts[at], name)
                weight.copy_(whole)
                for expert in range(len(weight)):
                    if (at, expert) in instead:
                        weight[expert] = instead[at, expert][name].float()
        found = self._answers()
        each = (self._truth.exp() * (self._truth - found)).sum(-1)
        by_place = found.view(*self._ids.shape, -1)[:, :-1]
        likelihood = by_place.gather(2, self._ids[:, 1:, None])
        return each.view(len(self._ids), -1).mean(-1), -likelihood.mean(dim=(1, 2))

    @torch.inference_mode()
    def _answers(self) -> torch.Tensor:
        parts = [self._model(row[None]).logits[0] for row in self._ids]
        return torch.log_softmax(torch.cat(parts), dim=-1)
