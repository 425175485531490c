"""Time of a decoder layer at one token without its matrices: caches warm, cold, and after a wait.

A random Mixtral of usual width is decoded token by token, and the time of its matrix products alone
is subtracted. The rest is Python, attention, norms and router. It takes longer when expert weights
pass through the caches, because code and small tensors are evicted from them.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import MixtralConfig, PreTrainedModel

from moe_tool.artifacts.hardware_profile import REST_S, Bits
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.experts.linear import computes_natively, linear
from moe_tool.hardware.experts import SiluGatedModule, use_threads
from moe_tool.hardware.synthetic_records import cut_matrix, cut_records, record_bytes
from moe_tool.models.kv_cache import new_kv_cache
from moe_tool.models.meta_model import build_meta_model
from moe_tool.models.moe_layers import MoeLayerModules, find_moe_layers
from moe_tool.models.skeleton import (
    LayerCall,
    assign,
    hook_routers,
    make_unsaved_buffers,
    remove_experts,
    set_experts_function,
)
from moe_tool.models.skeleton_source import linear_shapes
from moe_tool.models.stored_modules import put_stored, stored_weight
from moe_tool.native.kernels import NativeLinear, is_native
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import AnyWeight

Call = Callable[[], object]
_VOCABULARY, _N_EXPERTS, _TOP_K = 256, 8, 2
_DEPTH = 16
_WARM_UP_TOKENS = 2
_LEAST_S = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Dimensions of the model that is decoded."""

    n_layers: int = 16
    """Decoder layers; enough that the cost per forward is spread as in a usual model"""
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 8
    record_bytes: int = 23 * 10**6
    """Approximate size of an expert"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds of one decoder layer without its matrices."""

    warm_s: float
    cold_s: float
    """Time with cold caches, at least `warm_s`"""
    cold_bytes: int
    """Expert weights per layer that pass through the caches for `cold_s`"""
    rested_s: float
    """Time after a wait of REST_S, at least `cold_s`"""


def measure_layers(
    block: torch.Tensor,
    *,
    n_threads: int,
    n_tokens: int,
    budget_s: float,
    shape: LayerShape = LayerShape(),  # noqa: B008 (frozen)
    progress: Progress = SILENT,
) -> LayerTimes:
    """Decode and time a random model; sets the threads of the kernels and of torch.

    All layers share the skeleton's matrices, so that without experts they stay in a cache. Weights
    have 4 bits where the kernels compute, else they are bfloat16.

    Args:
        block: as `make_block` returns it, several times the last-level cache.
        n_tokens: maximum for each figure.
        budget_s: seconds for each figure, after which no other token begins; three are timed in any
            case.
    """
    use_threads(n_threads, 1)
    bits: Bits = "4" if is_native() else "native"
    inner = _inner(bits, shape)
    records = itertools.cycle(cut_records(block, bits, shape.hidden, inner))
    model, layers = _build_model(block, bits, shape)
    matrices = _matrices(model)
    with_experts = _with_experts(matrices, records, shape)
    slept: list[float] = []

    def answer(call: LayerCall) -> torch.Tensor:
        return call.run_experts(lambda wanted: ((expert, next(records)) for expert in wanted))

    def answer_rested(call: LayerCall) -> torch.Tensor:
        start = time.perf_counter()
        time.sleep(REST_S)
        slept.append(time.perf_counter() - start)
        return answer(call)

    progress.begin("decode layer by layer", 3 * n_tokens, "tokens")
    warm, cold, rested = (
        _beside(model, layers, answered, alone, n_tokens, budget_s, slept, progress)
        / shape.n_layers
        for answered, alone in (
            (_nothing, matrices),
            (answer, with_experts),
            (answer_rested, with_experts),
        )
    )
    progress.end()
    warm = max(warm, _LEAST_S)
    return LayerTimes(
        warm_s=warm,
        cold_s=max(warm, cold),
        cold_bytes=_TOP_K * record_bytes(bits, shape.hidden, inner),
        rested_s=max(warm, cold, rested),
    )


def _inner(bits: Bits, shape: LayerShape) -> int:
    """Return the inner width, a multiple of 64, at which a record has about the wanted size."""
    per_64 = record_bytes(bits, shape.hidden, 64)
    return 64 * max(1, shape.record_bytes // per_64)


def _build_model(
    block: torch.Tensor, bits: Bits, shape: LayerShape
) -> tuple[PreTrainedModel, tuple[MoeLayerModules, ...]]:
    config = MixtralConfig(
        vocab_size=_VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=64,  # the experts are replaced by `records`
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_local_experts=_N_EXPERTS,
        num_experts_per_tok=_TOP_K,
    )
    with tempfile.TemporaryDirectory(prefix="moe-tool-hardware-") as folder:
        config.save_pretrained(folder)
        model = build_meta_model(Path(folder))
    layers = find_moe_layers(model)
    remove_experts(layers)
    make_unsaved_buffers(model)
    shapes = linear_shapes(model, layers)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        if name in shapes:
            put_stored(model, name, cut_matrix(block, bits, *shapes[name]))
        else:
            assign(model, name, torch.rand(parameter.shape, generator=draw))
    hook_routers(layers)
    return model, layers


def _matrices(model: PreTrainedModel) -> list[Call]:
    """Return the skeleton's matrix products of one decoded token, layer by layer.

    The head is left out: it is small here, and shared by all layers.
    """
    calls: list[Call] = []
    for name, _ in model.named_modules():
        if name == "lm_head":
            continue
        weight = stored_weight(model, f"{name}.weight") if name else None
        if weight is not None:
            x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
            if computes_natively(weight, 1):
                calls.append(partial(NativeLinear(weight, None).forward, x))
            else:
                calls.append(partial(linear, x, weight))
    return calls


def _with_experts(
    matrices: list[Call], records: Iterator[Mapping[str, AnyWeight]], shape: LayerShape
) -> list[Call]:
    """Return the skeleton's products with `_TOP_K` experts after those of each layer."""
    x = torch.randn(1, shape.hidden, generator=torch.Generator().manual_seed(0))
    module = SiluGatedModule()

    def one_expert() -> torch.Tensor:
        return expert_forward(module, next(records), x)

    per_layer = len(matrices) // shape.n_layers
    calls: list[Call] = []
    for start in range(0, len(matrices), per_layer):
        calls += [*matrices[start : start + per_layer], *[one_expert] * _TOP_K]
    return calls


def _nothing(call: LayerCall) -> torch.Tensor:
    return call.hidden


@torch.inference_mode()
def _beside(
    model: PreTrainedModel,
    layers: tuple[MoeLayerModules, ...],
    answer: Callable[[LayerCall], torch.Tensor],
    alone: list[Call],
    n_tokens: int,
    budget_s: float,
    slept: list[float],
    progress: Progress,
) -> float:
    """Return the seconds of one token minus the calls in `alone` and the time slept."""
    draw = torch.Generator().manual_seed(0)
    n_positions = _DEPTH + _WARM_UP_TOKENS + n_tokens
    ids = torch.randint(0, _VOCABULARY, (1, n_positions), generator=draw)
    cache = new_kv_cache(model.config, n_positions=n_positions)
    set_experts_function(layers, _nothing)
    model(input_ids=ids[:, :_DEPTH], past_key_values=cache)
    set_experts_function(layers, answer)
    # Interleaved, so that a slow moment of the machine affects both.
    differences: list[float] = []
    end = time.perf_counter() + budget_s
    for position in range(_DEPTH, n_positions):
        slept.clear()
        start = time.perf_counter()
        model(input_ids=ids[:, position : position + 1], past_key_values=cache)
        middle = time.perf_counter()
        for call in alone:
            call()
        if position >= _DEPTH + _WARM_UP_TOKENS:
            differences.append(2 * middle - start - time.perf_counter() - sum(slept))
            progress.advance()
        if len(differences) >= 3 and time.perf_counter() > end:
            break
    return statistics.median(differences)
