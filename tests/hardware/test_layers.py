"""A small model is decoded, and what its matrices take is taken off."""

import pytest
import torch

from moe_tool.hardware import layers
from moe_tool.hardware.layers import LayerShape, measure_layers
from moe_tool.hardware.synthetic_records import make_block, record_bytes
from moe_tool.models.stored_modules import StoredLinear
from moe_tool.native.kernels import is_native

SHAPE = LayerShape(n_layers=2, hidden=64, heads=4, kv_heads=2, record_bytes=40_000)
BITS = "4" if is_native() else "native"


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def block() -> torch.Tensor:
    return make_block(2**22)


def test_times_are_positive_and_cold_is_not_below_warm(block: torch.Tensor) -> None:
    times = measure_layers(block, n_threads=1, n_tokens=3, budget_s=10.0, shape=SHAPE)
    assert 0 < times.warm_s <= times.cold_s < 10
    inner = layers._inner(BITS, SHAPE)
    assert times.cold_bytes == 2 * record_bytes(BITS, 64, inner)


def test_a_record_is_as_large_as_a_multiple_of_64_allows() -> None:
    shape = LayerShape()
    for bits in ("4", "native"):
        size = record_bytes(bits, shape.hidden, layers._inner(bits, shape))
        assert 0.95 * shape.record_bytes < size <= shape.record_bytes


def test_every_matrix_of_the_layers_is_taken_off_once(block: torch.Tensor) -> None:
    model, moe_layers = layers._build_model(block, BITS, SHAPE)
    assert [modules.layer for modules in moe_layers] == [0, 1]
    linears = [
        module
        for layer in model.model.layers
        for module in layer.modules()
        if isinstance(module, StoredLinear)
    ]
    shapes = [module.stored.shape for module in linears]
    assert sorted(shapes[:4]) == [(32, 64), (32, 64), (64, 64), (64, 64)]
    assert not [name for name, tensor in model.named_parameters() if tensor.is_meta]
    calls = layers._matrices(model)
    assert [call().shape[1] for call in calls] == [shape[0] for shape in shapes]


def test_what_is_left_is_the_forward_less_its_parts(
    block: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(layers.time, "perf_counter", lambda: now[0])
    tokens = []

    def model(*, input_ids, past_key_values):
        tokens.append(input_ids.shape[1])
        now[0] += 5.0

    def part():
        now[0] += 1.0

    model.config = layers._build_model(block, BITS, SHAPE)[0].config
    left = layers._beside(
        model, (), lambda call: call.hidden, [part] * 3, 4, 1e9, [], layers.SILENT
    )
    assert left == 5.0 - 3 * 1.0
    assert tokens == [16, 1, 1, 1, 1, 1, 1]  # the prompt, two to warm up, four
    tokens.clear()
    slept = []

    def waiting(*, input_ids, past_key_values):
        slept.append(2.0)
        model(input_ids=input_ids, past_key_values=past_key_values)

    waiting.config = model.config
    rested = layers._beside(
        waiting, (), lambda call: call.hidden, [part] * 3, 4, 1e9, slept, layers.SILENT
    )
    assert rested == 5.0 - 3 * 1.0 - 2.0
    tokens.clear()
    layers._beside(model, (), lambda call: call.hidden, [part] * 3, 40, 0.0, [], layers.SILENT)
    assert len(tokens) == 1 + 2 + 3
