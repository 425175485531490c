"""Costs that `smoe` divides misses by: measured with a given clock, and off unless asked for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.measured_costs import MeasuredCosts
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.moe_layer import Decision
from moe_tool.runtime.plan_run import announcements
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle

OUT = torch.zeros(8, dtype=torch.uint8)


class _Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def _reading(clock: _Clock, seconds: float):
    def read(layer, expert, out, *, n_there=0, go_on=None):
        clock.pass_(seconds)

    return read


def test_means_are_those_of_all_reads_and_products_so_far() -> None:
    clock = _Clock()
    costs = MeasuredCosts(clock=clock)
    costs.time_reads(_reading(clock, 0.004))(0, 0, OUT)
    assert costs.means_ms() is None
    for number, _ in costs.time_products(iter([(3, {}), (9, {}), (10, {})]), lambda n: n >= 8):
        clock.pass_(0.5 if number < 8 else 0.001 * (number - 8))
    assert costs.means_ms() == pytest.approx((4.0, 1.5))
    costs.time_reads(_reading(clock, 0.002))(0, 1, OUT)
    assert costs.means_ms() == pytest.approx((3.0, 1.5))
    costs.time_reads(_reading(clock, 9.0))(0, 1, OUT, go_on=lambda n: True)  # a prefetch
    assert costs.means_ms() == pytest.approx((3.0, 1.5))


def test_reads_that_overlap_share_their_time() -> None:
    """Two reads of 3 s that overlap for 2 s: four seconds for both."""
    clock = _Clock()
    costs = MeasuredCosts(clock=clock)

    def second(layer, expert, out, *, n_there=0, go_on=None):
        clock.pass_(2.0)

    def first(layer, expert, out, *, n_there=0, go_on=None):
        clock.pass_(1.0)
        costs.time_reads(second)(0, 1, out)
        clock.pass_(1.0)

    costs.time_reads(first)(0, 0, OUT)
    for _ in costs.time_products(iter([(0, {})]), lambda n: True):
        clock.pass_(1.0)
    assert costs.means_ms() == pytest.approx((2000.0, 1000.0))


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    model = LocatedModel(folder=tiny_checkpoint("qwen3_moe"), name="tiny")
    record_profile(
        model,
        parse_sources(["builtin"]),
        out=folder / "tiny.h5",
        tokens=256,
        seq_len=32,
        memory_bytes=8 * 2**30,
    )
    pack_bundle(model, out=folder / "bundle", profile=folder / "tiny.h5", replicas="2")
    return folder / "bundle"


class _Given(MeasuredCosts):
    """Means that are given."""

    def __init__(self, means: tuple[float, float]) -> None:
        super().__init__()
        self.given = means

    def means_ms(self) -> tuple[float, float] | None:
        return self.given


def _answered(
    bundle: Path,
    policy: str,
    means: tuple[float, float] | None = None,
    residency: Residency | None = None,
) -> tuple[float, list[tuple[float, float] | None], str]:
    """Return the share of misses answered by replicas, the costs that decisions saw, and the note
    on the policy; `means`: in place of measured ones."""
    options = run_options(memory="60%", policy=policy, residency=residency, context=64)
    with open_session(bundle, options) as session:
        note = next(n for n in announcements(session.plan, session.manifest) if "smoe" in n)
        if means is not None:
            session.runner.costs = _Given(means)
        seen: list[tuple[float, float] | None] = []
        forms = []

        def decided(decision: Decision) -> None:
            seen.append(decision.routing.costs_ms)
            missing = ~decision.resident[0][decision.routing.index]
            forms.append(decision.answers.form[missing & decision.answers.present])

        session.runner.on_decision = decided
        generate_ids(session, [[3, 4, 5]], GenerateOptions(max_tokens=24, ignore_eos=True))
    return float((np.concatenate(forms) > 0).mean()), seen, note


def test_a_split_goes_by_measured_times_only_where_asked_for(bundle: Path) -> None:
    words = "smoe:alpha=0,read-ms=1,replica-ms=1,part=0.4"
    given, seen, note = _answered(bundle, words, (0.0, 1.0))
    assert given > 0 and set(seen) == {None} and "depends on timing" not in note
    free, seen, note = _answered(bundle, f"{words},measured=1", (0.0, 1.0))
    assert free == 0 and set(seen) == {(0.0, 1.0)} and "depends on timing" in note


def test_a_session_measures_reads_and_products_as_it_runs(bundle: Path) -> None:
    words = "smoe:alpha=0,read-ms=1,replica-ms=0.001,part=0.4,measured=1"
    _, seen, _ = _answered(bundle, words)
    assert seen[0] is None
    assert seen[-1] is not None and min(seen[-1]) > 0


def test_replicas_stay_beside_a_cache(bundle: Path) -> None:
    words = "smoe:alpha=0,read-ms=1,replica-ms=0,part=0.4"
    by_replica, _, _ = _answered(bundle, words, residency="cache")
    assert by_replica > 0
