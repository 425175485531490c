"""Gradients of norms and routers, and the judgement of what they have learned."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from moe_tool.models.architecture import open_model
from moe_tool.models.layer_stream import LayerStream
from moe_tool.models.locate import LocatedModel
from moe_tool.quantization.weights import FloatWeight
from moe_tool.tuning.float_weights import FloatPlace, FloatWeights, Values, find_floats
from moe_tool.tuning.judge_floats import judge_floats, mixtures
from moe_tool.tuning.streamed_bundle import StreamedBundle

STEP = 1e-3
"""Of differences; a longer one would change which experts are chosen"""


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_gradients_are_those_of_differences(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """By central differences through the whole model, whose experts were disturbed."""
    opened = open_model(LocatedModel(folder=tiny_checkpoint(arch), name="tiny"))
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with opened.checkpoint, torch.no_grad():
        stream = LayerStream(tiny_checkpoint(arch), opened.checkpoint)
        floats = find_floats(stream, norms=True, router=True)

        def experts(layer: int) -> dict[int, dict[str, FloatWeight]]:
            return {
                e: {
                    n: FloatWeight(values=1.2 * v) for n, v in opened.experts.read(layer, e).items()
                }
                for e in range(opened.shape.experts)
            }

        bundle = StreamedBundle(stream, floats, experts)
        (exact,) = bundle.exact_states([ids])

        def loss(values: Values) -> float:
            ((states,),) = bundle.states([ids], [values])
            return float(bundle.divergence(exact, states, values).double().mean())

        start = loss(floats.start)
        value, found = bundle.gradients(ids, exact, floats.start)
        assert start > 0 and value == pytest.approx(start, rel=1e-4)
        assert found.keys() == floats.start.keys()
        kinds: set[tuple[str, bool]] = set()
        for place in floats.places:
            if (place.kind, place.layer is None) in kinds:
                continue
            kinds.add((place.kind, place.layer is None))
            way = found[place.name] / found[place.name].norm()
            ends = [
                loss({**floats.start, place.name: floats.start[place.name] + sign * STEP * way})
                for sign in (1, -1)
            ]
            measured = (ends[0] - ends[1]) / (2 * STEP)
            assert measured == pytest.approx(float(found[place.name].norm()), rel=0.05, abs=2e-4)
    assert kinds == {("norms", False), ("norms", True), ("router", False)}


class Judged:
    """A bundle whose divergence, by sequence, is a function of its one norm and one router."""

    def __init__(self, kl: Callable[[float, float, int], float]) -> None:
        self._kl = kl
        places = tuple(
            FloatPlace(name=kind, parameter=kind, kind=kind, layer=0)  # type: ignore[arg-type]
            for kind in ("norms", "router")
        )
        start = {place.name: torch.zeros(1) for place in places}
        self.floats = FloatWeights(places=places, start=start)

    def exact_states(self, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(batches)

    def states(
        self, batches: Sequence[torch.Tensor], candidates: Sequence[Values], *, watch: object
    ) -> list[list[torch.Tensor]]:
        return [list(batches) for _ in candidates]

    def divergence(self, exact: torch.Tensor, states: torch.Tensor, values: Values) -> torch.Tensor:
        rows = [
            self._kl(float(values["norms"]), float(values["router"]), int(row))
            for row in exact[:, 0]
        ]
        return torch.tensor(rows)[:, None].expand(exact.shape)


def judged(kl: Callable[[float, float, int], float]):  # type: ignore[no-untyped-def]
    bundle = Judged(kl)
    ids = torch.arange(16)[:, None].expand(16, 3)  # [N, S], of which every second one chooses
    trained = {"norms": torch.ones(1), "router": torch.ones(1)}
    return judge_floats(bundle, trained, ids, micro_batch=2, seed=0)  # type: ignore[arg-type]


def test_of_what_was_trained_the_best_mixture_is_kept() -> None:
    found = judged(lambda norms, router, row: 2 + 0.01 * row - 0.5 * norms + (router - 0.5) ** 2)
    assert found.shares == {"norms": 1.0, "router": 0.5}
    assert {name: float(value) for name, value in found.values.items()} == found.shares
    assert found.best.kl == pytest.approx(found.codes_alone.kl - 0.75)
    assert found.change_ci95[1] < 0


def test_what_harms_is_not_kept() -> None:
    found = judged(lambda norms, router, row: 1 + 0.01 * row + norms + router)
    assert found.shares == {"norms": 0.0, "router": 0.0}
    assert found.best == found.codes_alone and found.change_ci95 == (0.0, 0.0)


@pytest.mark.parametrize("worth", [0.2, -0.01])
def test_what_helps_those_that_chose_it_alone_is_not_kept(worth: float) -> None:
    """Others are harmed, or gain too little to tell from chance."""

    def kl(norms: float, router: float, row: int) -> float:
        chance = 0.3 if row % 4 == 1 else -0.3
        return 2 - norms if row % 2 == 0 else 2 + norms * (worth + chance)

    found = judged(kl)
    assert found.shares == {"norms": 0.0, "router": 0.0}
    assert found.change_ci95[1] > 0


def test_mixtures_are_of_what_was_trained() -> None:
    both = Judged(lambda *_: 0.0).floats
    assert len(mixtures(both)) == 9 and mixtures(both)[0] == {"norms": 0.0, "router": 0.0}
    alone = FloatWeights(places=both.places[:1], start=both.start)
    assert mixtures(alone) == [{"norms": share} for share in (0.0, 0.5, 1.0)]
