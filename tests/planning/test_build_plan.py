"""Plans from a real little profile: what was chosen, what is written, what is refused."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.budget.request import MemoryRequest, parse_memory
from moe_tool.errors import ArtifactVersionError, BudgetError
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.formats.policy_names import read_plan
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.hardware.shipped import shipped_profile
from moe_tool.models.locate import LocatedModel
from moe_tool.planning.build_plan import PlanReport, build_plan
from moe_tool.planning.cached_replica import search_cached_replica
from moe_tool.planning.candidate import Candidate
from moe_tool.planning.eviction_replays import replay_evictions
from moe_tool.planning.lossy_answers import lossy_answers
from moe_tool.planning.model_costs import record_size
from moe_tool.planning.packed_experts import uniform_experts
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources, read_sources
from moe_tool.profiling.recorder import record_profile
from moe_tool.progress import SILENT
from moe_tool.text.sources import parse_sources

HALF = PlanRequest(memory=parse_memory("50%"), context=64)
_LOOSE = 2.0
"""Nats per token: random weights are sensitive"""
_SLOW_DISK = 1e6
"""Bytes per second: misses cost so much that lossy answers pay"""


@pytest.fixture(scope="module")
def sources(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PlanSources]:
    path = tmp_path_factory.mktemp("profile") / "p.h5"
    model = LocatedModel(folder=tiny_checkpoint("mixtral", "bfloat16"), name="tiny")
    record_profile(
        model,
        parse_sources(["builtin"]),
        out=path,
        tokens=512,
        seq_len=32,
        memory_bytes=8 * 2**30,
    )
    with ProfileReader.open(path) as reader:
        yield read_sources(reader)


def _plan(sources: PlanSources, request: PlanRequest, *, disk: float | None = None) -> PlanReport:
    return build_plan(sources, _machine(disk), request)


def _machine(disk: float | None) -> HardwareProfile:
    machine = shipped_profile("laptop-16gb")
    if disk is None:
        return machine
    rows = tuple(row.model_copy(update={"bytes_per_s": disk}) for row in machine.disk)
    return machine.model_copy(update={"disk": rows})


@pytest.mark.parametrize(
    "changed",
    [
        {"bits": "4"},
        {"bits": "8", "memory": parse_memory("100%")},
        {"max_kl": 0.5},
        {"max_kl": _LOOSE, "bits": "native"},
        {"average_bits": 2.5, "memory": parse_memory("100%")},
        {"average_bits": 2.5, "memory": parse_memory("1GiB"), "max_kl": 50.0},
        {"bits": "mixed", "memory": parse_memory("1GiB")},
        {"bits": "mixed", "memory": parse_memory("100%"), "max_kl": 0.05},
    ],
)
def test_a_plan_survives_being_written(
    sources: PlanSources, tmp_path: Path, changed: dict[str, object]
) -> None:
    request = replace(HALF, **changed)  # type: ignore[arg-type]
    report = _plan(sources, request, disk=_SLOW_DISK)
    plan = report.plan
    write_json_artifact(tmp_path / "p.json", plan)
    assert read_plan(tmp_path / "p.json") == plan
    assert sum(line.size_bytes for line in plan.lines) <= plan.memory_bytes
    if request.memory.kind == "bytes":
        assert plan.memory_bytes == request.memory.size_bytes
    shape = sources.profile.header.shape
    if request.is_mixed:
        assert plan.bits == "mixed" and [e.layer for e in plan.expert_bits] == list(shape.layers)
        assert all(len(entry.bits) == shape.experts for entry in plan.expert_bits)
        assert plan.prediction.kl == report.allocations[0].nats
        widths = [width for entry in plan.expert_bits for width in entry.bits]
        if request.average_bits is not None:
            assert sum(widths) / len(widths) <= request.average_bits
    if request.max_kl is not None:
        assert plan.prediction.kl is not None and plan.prediction.kl <= request.max_kl
    assert (plan.policy is None) == (plan.max_kl is None) == (not plan.forms)


def test_a_lossy_plan_says_who_is_in_memory_in_which_form(sources: PlanSources) -> None:
    plan = _plan(sources, replace(HALF, bits="native", max_kl=_LOOSE), disk=_SLOW_DISK).plan
    shape = sources.profile.header.shape
    n_experts = shape.experts * len(shape.layers)
    assert plan.policy is not None and plan.max_kl == _LOOSE
    roles = [form.role for form in plan.forms]
    assert roles == ["primary"] + ["replica"] * len(plan.replicas.split(","))
    assert [form.precision for form in plan.forms] == [plan.bits, *plan.replicas.split(",")]
    for form in plan.forms:
        assert form.record_bytes == record_size(sources.profile.header, form.precision)
        assert len(form.resident) + form.n_disk_only in (n_experts, len(form.resident))
    assert plan.forms[0].n_disk_only == n_experts - len(plan.forms[0].resident)
    held = [key for form in plan.forms for key in form.resident]
    assert len(held) == len(set(held))


@pytest.mark.parametrize("max_kl", [0.001, 0.02, 0.5, _LOOSE])
def test_no_way_that_keeps_the_limit_is_noticeably_faster(
    sources: PlanSources, max_kl: float
) -> None:
    request = replace(HALF, max_kl=max_kl)
    machine = _machine(_SLOW_DISK)
    plan = build_plan(sources, machine, request).plan
    every = []
    for bits in ("native", "8", "4"):
        experts = uniform_experts(sources, machine, request, bits)
        exact = replay_evictions(sources, experts, "50%", SILENT)
        answers = lossy_answers(sources, experts, experts.memory.n_slots)
        cached = search_cached_replica(sources, experts, experts.memory.n_slots, max_kl=max_kl)
        answers += [] if cached is None else [cached]
        every += [Candidate(experts=experts, exact=exact, lossy=each) for each in (*answers, None)]
    kept = [each for each in every if each.nats_per_token <= max_kl]
    assert plan.prediction.kl is not None and plan.prediction.kl <= max_kl
    fastest = max(each.tokens_per_second for each in kept)
    assert plan.prediction.tokens_per_second >= 0.98 * fastest
    assert any(
        (each.tokens_per_second, each.nats_per_token)
        == (plan.prediction.tokens_per_second, plan.prediction.kl)
        for each in kept
    )


@pytest.mark.parametrize(
    "request_",
    [
        PlanRequest(memory=parse_memory("1MiB"), bits="4", context=64),
        PlanRequest(memory=parse_memory("1MiB"), context=64, max_kl=0.1),
        PlanRequest(memory=parse_memory("1MiB"), bits="mixed", context=64),
        PlanRequest(memory=parse_memory("1MiB"), average_bits=2.0, context=64),
    ],
)
def test_too_small_a_budget_is_refused_with_both_numbers_and_one_that_works(
    sources: PlanSources, request_: PlanRequest
) -> None:
    with pytest.raises(BudgetError) as caught:
        _plan(sources, request_)
    assert f"has 1.00 MiB ({2**20} bytes)" in caught.value.message
    needed = re.search(r"needs .*? \((\d+) bytes\)", caught.value.message)
    typed = re.search(r"--memory ([\w.]+)", caught.value.hint or "")
    assert needed is not None and typed is not None
    enough = parse_memory(typed[1])
    assert 0 <= enough.size_bytes - int(needed[1]) <= 32 * 2**20
    assert _plan(sources, replace(request_, memory=enough)).plan.memory_bytes == enough.size_bytes
    just = MemoryRequest(kind="bytes", size_bytes=int(needed[1]))
    assert _plan(sources, replace(request_, memory=just)).plan.memory_bytes == int(needed[1])


def test_a_limit_out_of_reach_is_refused_with_one_that_is_kept(sources: PlanSources) -> None:
    for request in (
        replace(HALF, bits="4", max_kl=0.0),
        replace(HALF, average_bits=2.0, memory=parse_memory("1GiB"), max_kl=1e-6),
    ):
        with pytest.raises(BudgetError, match="out of reach") as caught:
            _plan(sources, request)
        enough = re.search(r"--max-kl ([^,]+)", caught.value.hint or "")
        assert enough is not None
        plan = _plan(sources, replace(request, max_kl=float(enough[1]))).plan
        assert plan.prediction.kl is not None and plan.prediction.kl <= float(enough[1])


def test_more_memory_is_never_slower_at_the_same_bits(sources: PlanSources) -> None:
    report = _plan(sources, replace(HALF, bits="4"), disk=_SLOW_DISK)
    speeds = [each.tokens_per_second for each in report.neighbours]
    assert speeds == sorted(speeds) and report.neighbours[-1].ratio >= 1
    assert all(each.kl is None for each in report.neighbours)


def test_a_plan_of_the_first_version_is_refused_in_one_sentence(
    sources: PlanSources, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    plan = _plan(sources, replace(HALF, bits="4")).plan
    old = plan.model_dump_json().replace('"format_version":2', '"format_version":1')
    assert old != plan.model_dump_json()
    path.write_text(old)
    with pytest.raises(ArtifactVersionError) as caught:
        read_plan(path)
    assert "\n" not in caught.value.message and "moe-tool plan" in str(caught.value.hint)
    assert PackPlan.model_validate_json(plan.model_dump_json()) == plan
