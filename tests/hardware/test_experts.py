"""Synthetic records are experts like any other, and two times give a line."""

import pytest
import torch

from moe_tool.artifacts.hardware_profile import BITS
from moe_tool.artifacts.moe_shape import ExpertTensor
from moe_tool.artifacts.precision import precision_from_bits
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.formats.record_form import record_form
from moe_tool.hardware import experts
from moe_tool.hardware.experts import SiluGatedModule, fit_two, measure_experts, use_threads
from moe_tool.hardware.synthetic_records import (
    cut_matrix,
    cut_records,
    make_block,
    matrix_bytes,
    record_bytes,
)
from moe_tool.native.kernels import is_native
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import IntegerWeight
from tests.formats.shapes import shape_of

H, I = 96, 64  # noqa: E741


@pytest.fixture(scope="module")
def block() -> torch.Tensor:
    return make_block(2**22)


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", ["native", "8", "4"])
def test_a_record_has_the_size_that_a_bundle_gives_it(bits: str) -> None:
    tensors = [
        ExpertTensor(name="gate_up_proj", shape=(2 * I, H)),
        ExpertTensor(name="down_proj", shape=(H, I)),
    ]
    layout = record_form(shape_of(tensors), precision_from_bits(bits)).layout
    assert record_bytes(bits, H, I) == layout.size_bytes


def test_bytes_by_hand() -> None:
    # 3 bits: planes of 2 and 1, 64 x 128 numbers; 4 row blocks x 2 groups x 16 scales of 2 bytes.
    assert matrix_bytes("3", 64, 128) == 4096 + 4096 + 4096
    # 64 x 512: 8192 and 4096, 4 x 8 x 16 x 2 = 1024 padded to 4096.
    assert matrix_bytes("3", 64, 512) == 8192 + 4096 + 4096
    assert matrix_bytes("native", 64, 128) == 16384


@pytest.mark.parametrize("bits", BITS)
def test_records_lie_behind_each_other_and_are_finite(block: torch.Tensor, bits) -> None:
    records = cut_records(block, bits, H, I)
    size = record_bytes(bits, H, I)
    assert len(records) == len(block) // size > 10
    x = torch.randn(3, H)
    for number in (0, 1, len(records) - 1):
        first, second = records[number]["gate_up_proj"], records[number]["down_proj"]
        assert first.shape == (2 * I, H) and second.shape == (H, I)
        tensor = first.planes[0] if isinstance(first, IntegerWeight) else first.values
        assert tensor.data_ptr() == block.data_ptr() + number * size
        out = expert_forward(SiluGatedModule(), records[number], x)
        assert out.shape == (3, H) and torch.isfinite(out).all()
        assert out.abs().max() > 0


@pytest.mark.parametrize("bits", BITS)
def test_every_number_in_a_block_is_an_ordinary_one(block: torch.Tensor, bits) -> None:
    matrix = cut_matrix(block, bits, 2 * I, H)
    values = dequantize(matrix) if isinstance(matrix, IntegerWeight) else matrix.values.float()
    assert torch.isfinite(values).all()
    assert values.std() > 0
    floats = [matrix.scales] if isinstance(matrix, IntegerWeight) else [matrix.values]
    for part in floats:
        assert part.abs().min() > torch.finfo(part.dtype).tiny


def test_a_block_without_room_for_two_is_a_bug() -> None:
    with pytest.raises(ValueError, match="1000 bytes"):
        cut_records(torch.zeros(1000, dtype=torch.uint8), "4", H, I)


@pytest.mark.parametrize(
    ("sizes", "seconds", "wanted"),
    [
        ((200, 400), (3.0, 4.0), (2.0, 200.0)),  # 200 bytes more take 1 s, so do the first 200
        ((200, 300), (1.0, 3.0), (0.0, 100.0)),  # the line would begin below 0: 300 bytes in 3 s
        ((200, 300), (5.0, 4.0), (0.0, 75.0)),  # the larger one was faster: 300 bytes in 4 s
        ((200, 300), (4.0, 4.0), (0.0, 75.0)),
    ],
)
def test_a_line_through_two_sizes(sizes, seconds, wanted) -> None:
    assert fit_two(sizes, seconds) == wanted


def test_every_kind_of_call_has_a_row(block: torch.Tensor) -> None:
    rows = measure_experts(
        block,
        threads=(1, 2),
        tokens=(1, 40),
        repetitions=2,
        budget_s=0.001,
        shapes=((128, 128), (256, 256)),
    )
    wanted = [(bits, n, t) for bits in BITS for n in (1, 2) for t in (1, 40)]
    assert [(row.bits, row.threads, row.tokens) for row in rows] == wanted
    assert all(row.tiny_s and row.fitted_from_bytes for row in rows)


def test_records_are_taken_in_turn(block: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(experts, "expert_forward", lambda module, weights, x: seen.append(weights))
    calls = experts._calls(block, "native", (512, 256))  # 786432 bytes: 5 of them
    one, other = calls(1), calls(4)
    for _ in range(3):
        one(), other()
    assert len({id(weights) for weights in seen[:5]}) == 5
    assert seen[5] is seen[0]


@pytest.mark.parametrize("tokens", [1, 33])
def test_threads_are_shared_as_in_a_session(tokens: int) -> None:
    use_threads(2, tokens)
    assert torch.get_num_threads() == (1 if is_native() and tokens <= 32 else 2)
    use_threads(1, 1)
