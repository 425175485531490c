"""Torch's threads rest where the kernels do the work, and nowhere else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_tool.experts.linear import FEW_TOKENS
from moe_tool.runtime import compute_threads
from moe_tool.runtime.compute_threads import ComputeThreads, choose_threads


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made_manifest(dtype: str = "bfloat16", kinds: tuple[str, ...] = ("native",)) -> Any:
    primaries = [SimpleNamespace(precision=SimpleNamespace(kind=kind)) for kind in kinds]
    return SimpleNamespace(primaries=primaries, shape=SimpleNamespace(dtype=dtype))


@pytest.mark.parametrize(
    ("n_tokens", "wanted"), [(1, 1), (FEW_TOKENS, 1), (FEW_TOKENS + 1, 3), (500, 3)]
)
def test_torch_rests_while_the_kernels_compute_few_tokens(n_tokens, wanted):
    threads = ComputeThreads(n_threads=3, kernels_decode=True)
    torch.set_num_threads(2)
    threads.before_forward(n_tokens)
    assert torch.get_num_threads() == wanted


def test_torch_keeps_its_threads_where_it_computes_itself():
    torch.set_num_threads(1)
    ComputeThreads(n_threads=3, kernels_decode=False).before_forward(1)
    assert torch.get_num_threads() == 3


def test_float32_matrices_and_missing_kernels_are_torchs(monkeypatch):
    monkeypatch.setattr(compute_threads, "is_native", lambda: True)
    assert choose_threads(2, made_manifest("bfloat16")).kernels_decode
    assert not choose_threads(2, made_manifest("float32")).kernels_decode
    assert choose_threads(2, made_manifest("float32", ("kept",))).kernels_decode
    assert choose_threads(2, made_manifest("float32", ("integer", "kept"))).kernels_decode
    assert not choose_threads(2, made_manifest("float32", ("integer", "native"))).kernels_decode
    monkeypatch.setattr(compute_threads, "is_native", lambda: False)
    assert not choose_threads(2, made_manifest("bfloat16")).kernels_decode


def test_a_core_is_left_to_the_readers_where_torch_computes(monkeypatch):
    monkeypatch.setattr(compute_threads, "is_native", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    assert choose_threads(None, made_manifest("bfloat16")).n_threads == 6
    assert choose_threads(None, made_manifest("float32")).n_threads == 5
    assert choose_threads(4, made_manifest("float32")).n_threads == 4


def test_one_core_is_enough(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert choose_threads(None, made_manifest("float32")).n_threads == 1
