"""Measurement of bit prices with the quantizer in use: one pass, one layer in memory at a time."""

from collections.abc import Sequence

import numpy as np

from moe_tool import __version__
from moe_tool.artifacts.bit_prices import BitPrices, LayerBitPrices, Width
from moe_tool.artifacts.identity import require_same_model
from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.artifacts.router_trace import mean_squared_gates
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.formats.record_form import record_form
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.calibrated_layers import CalibratedLayer, CalibratedModel
from moe_tool.packing.expert_records import MEASURED_TOKENS, ExpertRecords
from moe_tool.packing.write_records import naming
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.quantizers.registry import QUANTIZERS

MEASURED_WIDTHS: tuple[Width, ...] = (1, 2, 3, 4)
_DISTURBED_WIDTH: Width = 2
_WATCHED_BYTES = 256 * 2**20
_MOST_WATCHED = 4096


def measure_bit_prices(
    model: LocatedModel,
    profile: ProfileReader,
    quantizer: Quantizer,
    *,
    widths: Sequence[Width] = MEASURED_WIDTHS,
    progress: Progress = SILENT,
) -> BitPrices:
    """Return the errors of all experts at all widths.

    Each layer's sensitivity to quantization errors is measured too, on some sequences with this
    layer alone at 2 bits. The profile's sensitivity, to noise in all directions, was half to twice
    as large on a trained model.

    Args:
        widths: numbers of bits, ascending.

    Raises:
        WrongModelError: the profile belongs to another model.
        CorruptArtifactError: an input is damaged.
    """
    opened = open_model(model)
    require_same_model(
        profile.header.identity,
        opened.identity,
        artifact=f"the profile {profile.path}",
        remedy=f"moe-tool profile {opened.identity.name} --data builtin",
    )
    shape = opened.shape
    zeros = QUANTIZERS[quantizer].makes_zeros
    made = [IntegerPrecision(width_bits=width).with_zeros(zeros) for width in widths]
    with opened.checkpoint:
        walk = CalibratedModel(model.folder, opened, profile.tokens)
        copies = 1 + len(shape.layers)
        walk.watch(min(_MOST_WATCHED, _WATCHED_BYTES // (4 * shape.hidden * copies)))
        progress.begin("measure bits", len(shape.layers) * shape.experts, "experts")
        errors = {
            layer.layer: _measure_layer(layer, opened, quantizer, made, progress)
            for layer in walk.layers()
        }
        progress.end()
        ratios = _kl_ratios(walk, profile, errors, widths)
    return BitPrices(
        tool_version=__version__,
        identity=opened.identity,
        profile_sha256=profile.sha256,
        quantizer=quantizer,
        widths=tuple(widths),
        layers=tuple(
            LayerBitPrices(layer=layer, eps=tuple(map(tuple, eps.tolist())), kl_ratio=ratios[layer])
            for layer, eps in errors.items()
        ),
    )


def _measure_layer(
    layer: CalibratedLayer,
    opened: OpenedModel,
    quantizer: Quantizer,
    precisions: Sequence[IntegerPrecision],
    progress: Progress,
) -> np.ndarray:
    """Return the errors of a layer's experts, [precisions, E], and continue the watched sequences
    with the layer at 2 bits."""
    shape = opened.shape
    forms = [record_form(shape, precision) for precision in precisions]
    eps = np.zeros((len(forms), shape.experts))
    coarse: dict[int, ExpertWeights] = {}
    for expert in range(shape.experts):
        sample = layer.sample(expert, most_measured=MEASURED_TOKENS)
        records = ExpertRecords(sample, quantizer)
        for at, (precision, form) in enumerate(zip(precisions, forms, strict=True)):
            with naming(opened, layer.layer, expert):
                found = records.make(form, precision)
            eps[at, expert] = found.eps
            if precision.width_bits == _DISTURBED_WIDTH:
                coarse[expert] = form.decode(found.record)
        progress.advance()
    if coarse:
        layer.disturb(coarse)
    return eps


def _kl_ratios(
    walk: CalibratedModel,
    profile: ProfileReader,
    errors: dict[int, np.ndarray],
    widths: Sequence[Width],
) -> dict[int, float]:
    """Return measured over expected divergence by layer; the latter by the profile's sensitivity,
    nats per token."""
    if _DISTURBED_WIDTH not in widths:
        return dict.fromkeys(errors, 1.0)
    row = list(widths).index(_DISTURBED_WIDTH)
    found = {}
    for (layer, eps), measured in zip(errors.items(), walk.divergences(), strict=True):
        index, weight = profile.indices(layer, "top_k_index"), profile.gate_weights(layer)
        use = mean_squared_gates(index, weight, eps.shape[1])
        expected = (profile.statistics(layer).nats * use * eps[row] ** 2).sum()
        found[layer] = float(np.clip(measured / expected, 0.05, 20.0)) if expected > 0 else 1.0
    return found
