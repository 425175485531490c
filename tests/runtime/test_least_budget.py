"""The budget that a refusal names works, and 1 MiB and a slot less does not."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.benchmarking.bench import bench
from moe_tool.benchmarking.bench_plan import BenchOptions
from moe_tool.budget.account import plan_memory
from moe_tool.budget.refusal import MemoryLine
from moe_tool.budget.request import MemoryRequest, parse_memory
from moe_tool.budget.slots import ExpertRoom
from moe_tool.errors import BudgetError
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle

MIB = 2**20


@pytest.fixture(scope="module")
def with_replicas(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="mixtral")
    record_profile(model, parse_sources(["builtin"]), out=folder / "p.h5", tokens=512, seq_len=32)
    pack_bundle(model, out=folder / "b", bits="8", replicas="2", profile=folder / "p.h5")
    return folder / "b"


def named(refused: BudgetError) -> int:
    found = re.search(r"--memory (\S+?MiB)\b", refused.hint or "")
    assert found is not None, refused
    return parse_memory(found[1]).size_bytes


@pytest.fixture(autouse=True)
def steady_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of tests grows with everything that they import; a user's starts anew."""
    monkeypatch.setattr("moe_tool.runtime.session.current_rss_bytes", lambda: 430 * MIB)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefetch": "next-layer"},
        {"eviction": "lru:per-layer"},
        {"rows": "1KiB"},
        {"policy": "drop", "gates": False},
        {"context": 64, "seed": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("bundle", ["native", "replicas"])
def test_run_works_with_what_its_refusal_names(
    options: dict[str, object],
    bundle: str,
    tiny_bundle: Callable[..., Path],
    with_replicas: Path,
) -> None:
    folder = tiny_bundle("mixtral") if bundle == "native" else with_replicas
    with pytest.raises(BudgetError) as refused:
        open_session(folder, run_options(memory="1MiB", **options))  # type: ignore[arg-type]
    nearest = named(refused.value)
    with open_session(
        folder,
        run_options(memory=str(nearest), **options),  # type: ignore[arg-type]
    ) as session:
        slot = max(record.record_size_bytes for record in session.bundle.manifest.primaries)
        assert nearest - session.plan.memory.total_bytes <= MIB + slot
    with pytest.raises(BudgetError):
        open_session(
            folder,
            run_options(memory=str(nearest - MIB - slot), **options),  # type: ignore[arg-type]
        )


def test_bench_works_with_what_its_refusal_names(tiny_bundle: Callable[..., Path]) -> None:
    def measure(size: int) -> None:
        request = MemoryRequest(kind="bytes", size_bytes=size)
        options = BenchOptions(
            memory=(request,), prompt_tokens=(4,), generate=(2,), repetitions=1, random=True
        )
        bench(folder, options)

    folder = tiny_bundle("mixtral")
    with pytest.raises(BudgetError) as refused:
        measure(MIB)
    nearest = named(refused.value)
    measure(nearest)
    with pytest.raises(BudgetError):
        measure(nearest - 2 * MIB)


@given(
    fixed=st.integers(0, 2**36),
    loading=st.integers(0, 2**36),
    record=st.integers(1, 2**28),
    least=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_the_figure_is_within_a_mib_of_the_least_of_any_account(
    fixed: int, loading: int, record: int, least: int
) -> None:
    def plan(size: int) -> None:
        plan_memory(
            MemoryRequest(kind="bytes", size_bytes=size),
            fixed=(MemoryLine(name="fixed", size_bytes=fixed),),
            loading_bytes=loading,
            experts=(ExpertRoom(record_bytes=record, n_experts=10, n_slots_min=least),),
            available_bytes=None,
        )

    with pytest.raises(BudgetError) as refused:
        plan(0)
    nearest = named(refused.value)
    plan(nearest)
    with pytest.raises(BudgetError):
        plan(nearest - MIB)
