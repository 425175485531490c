"""ECO beside training with a master copy, which it is to replace."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.tuning.eco import (
    EcoRule,
    EcoState,
    begin,
    state_bytes_per_weight,
    takes_residual,
    update,
)

WIDTH = 8
BETA = 0.9


@dataclass(frozen=True)
class LeastSquares:
    """A loss of 64 weights whose best values lie between the points of the grid."""

    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def draw(cls, seed: int) -> "LeastSquares":
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(256, 64, generator=generator) / 4
        best = 128 + 12 * torch.randn(1, 64, generator=generator)
        return cls(a, best @ a.T)

    def loss(self, weights: torch.Tensor) -> float:
        return float((weights.float() @ self.a.T - self.b).square().mean())

    def gradient(self, weights: torch.Tensor) -> torch.Tensor:
        return 2 * (weights.float() @ self.a.T - self.b) @ self.a / len(self.a)


def start() -> torch.Tensor:
    return torch.full((1, 64), 128, dtype=torch.uint8)


def train_master(
    problem: LeastSquares, rates: list[float], residual: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """SGD with momentum on weights in float64, gradients taken at what they are rounded to."""
    weights = start().double() + (0 if residual is None else residual.double())
    momentum = torch.zeros_like(weights)
    seen = []
    for rate in rates:
        rounded = weights.round() if seen else start().double()
        momentum = BETA * momentum + (1 - BETA) * problem.gradient(rounded).double()
        weights = weights - rate * momentum
        seen.append(weights.round().to(torch.uint8))
    return seen, weights


def train(
    problem: LeastSquares,
    rule: EcoRule,
    rates: list[float],
    residual: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], EcoState]:
    codes = start()
    state = begin(codes, rule, rate=rates[0], residual=residual)
    draw = torch.Generator().manual_seed(1)
    seen = []
    for rate, next_rate in zip(rates, [*rates[1:], rates[-1]], strict=True):
        codes, state = update(
            codes,
            problem.gradient(codes),
            state,
            rule,
            rate=rate,
            next_rate=next_rate,
            width_bits=WIDTH,
            draw=draw,
        )
        seen.append(codes)
    return seen, state


def falling(rate: float, steps: int) -> list[float]:
    return [rate * (1 - 0.9 * step / steps) for step in range(steps)]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("falls", [False, True])
def test_exact_feedback_is_training_with_a_master_copy(falls: bool, has_residual: bool) -> None:
    problem = LeastSquares.draw(0)
    rates = falling(0.3, 100) if falls else [0.3] * 100  # later float32 decides ties by chance
    generator = torch.Generator().manual_seed(2)
    residual = torch.rand(1, 64, generator=generator) - 0.5 if has_residual else None
    wanted, master = train_master(problem, rates, residual)
    rule = EcoRule(feedback="exact")
    found, state = train(problem, rule, rates, None if residual is None else residual.clone())
    assert (wanted[-1] != start()).float().mean() > 0.8
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    assert state.residual is not None
    # In codes of 128: 1e-6 of a weight, in float32.
    assert torch.allclose(found[-1] + state.residual, master.float(), atol=1.28e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_plain_rounding_stalls_eco_arrives(seed: int) -> None:
    problem = LeastSquares.draw(seed)
    rates = falling(0.05, 4000)
    _, master = train_master(problem, rates)
    plain, _ = train(problem, EcoRule(feedback="none"), rates)
    eco, _ = train(problem, EcoRule(), rates)
    assert torch.equal(plain[-1], start())
    assert (eco[-1] != start()).float().mean() > 0.9
    # The codes of a master copy are the best that any way to train codes can be held to.
    assert problem.loss(eco[-1]) <= 1.75 * problem.loss(master.round())
    assert problem.loss(eco[-1]) < 0.01 * problem.loss(plain[-1])


def test_stochastic_rounding_needs_no_feedback_and_bears_it() -> None:
    problem = LeastSquares.draw(0)
    rates = falling(0.05, 3000)
    began = problem.loss(start())
    for feedback in ("none", "momentum"):
        rule = EcoRule(rounding="stochastic", feedback=feedback)
        assert problem.loss(train(problem, rule, rates)[0][-1]) < 0.05 * began


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_adam_arrives_too(rounding: str) -> None:
    problem = LeastSquares.draw(0)
    rates = falling(0.05, 3000)
    rule = EcoRule(optimizer="adam", rounding=rounding)  # type: ignore[arg-type]
    plain = EcoRule(optimizer="adam", feedback="none")
    began = problem.loss(start())
    assert problem.loss(train(problem, rule, rates)[0][-1]) < 0.05 * began
    assert problem.loss(train(problem, plain, rates)[0][-1]) == began


def test_adams_first_two_steps_by_hand() -> None:
    codes = torch.tensor([[5]], dtype=torch.uint8)
    rule = EcoRule(optimizer="adam", beta1=0.5, beta2=0.75)
    state = begin(codes, rule, rate=0.4)
    step = {"rate": 0.4, "next_rate": 0.2, "width_bits": 4}
    codes, state = update(codes, torch.tensor([[2.0]]), state, rule, **step)  # type: ignore[arg-type]
    # m~ = 1, v = 1, corrected 2 and 4: wanted 5 - 0.4 * 2 / 2 = 4.6, rounded 5, lost -0.4.
    # m' = 1 - 0.4 * 2 * 0.5 / 0.4 + 0.4 * 2 * 0.75 / (0.2 * 0.5) = 1 - 1 + 6.
    assert codes.item() == 5
    assert state.momentum.item() == pytest.approx(6.0, rel=1e-6)
    assert state.variance is not None and state.variance.item() == pytest.approx(1.0)
    # m~ = 3, v = 0.75, corrected 0.75 / 0.4375, by 0.2: 5 - 0.2 * 4 / 1.309 = 4.389.
    again, _ = update(
        codes,
        torch.tensor([[0.0]]),
        state,
        rule,
        rate=0.2,
        next_rate=0.2,
        width_bits=4,
    )
    assert again.item() == 4


def test_an_update_that_is_lost_adds_up() -> None:
    """If no code moves, m' = m~ / beta."""
    codes = torch.tensor([[5]], dtype=torch.uint8)
    rule = EcoRule()
    state = begin(codes, rule, rate=0.1)
    codes, state = update(
        codes, torch.tensor([[1.0]]), state, rule, rate=0.1, next_rate=0.1, width_bits=4
    )
    assert codes.item() == 5
    assert state.momentum.item() == pytest.approx((1 - BETA) / BETA, rel=1e-5)


def test_a_residual_moves_a_code_at_the_first_step_that_completes_it() -> None:
    codes = torch.tensor([[5, 5, 5]], dtype=torch.uint8)
    residual = torch.tensor([[0.45, 0.0, -0.45]])
    rule = EcoRule()
    state = begin(codes, rule, rate=1.0, residual=residual)
    gradient = torch.full((1, 3), -1.0)  # 0.1 upwards in the first step
    codes, state = update(codes, gradient, state, rule, rate=1.0, next_rate=1.0, width_bits=4)
    assert codes.tolist() == [[6, 5, 5]]


def test_a_code_at_the_edge_comes_back_as_soon_as_it_is_pulled() -> None:
    codes = torch.tensor([[15]], dtype=torch.uint8)
    rule = EcoRule()
    state = begin(codes, rule, rate=0.2)
    for _ in range(500):  # outwards: a residual without bounds would be 100 codes by now
        gradient = torch.full((1, 1), -1.0)
        codes, state = update(codes, gradient, state, rule, rate=0.2, next_rate=0.2, width_bits=4)
        assert codes.item() == 15
    for count in range(100):  # noqa: B007
        gradient = torch.full((1, 1), 1.0)
        codes, state = update(codes, gradient, state, rule, rate=0.2, next_rate=0.2, width_bits=4)
        if codes.item() < 15:
            break
    assert count < 60


def test_no_state_holds_a_copy_of_the_weights() -> None:
    codes = torch.zeros(32, 128, dtype=torch.uint8)
    wanted = {
        EcoRule(): 4,
        EcoRule(rounding="stochastic"): 4,
        EcoRule(optimizer="adam"): 8,
        EcoRule(feedback="exact"): 8,
    }
    for rule, size in wanted.items():
        state = begin(codes, rule, rate=0.1)
        held = [value for value in vars_of(state) if isinstance(value, torch.Tensor)]
        assert sum(value.nbytes for value in held) == state.size_bytes == size * codes.numel()
        assert state_bytes_per_weight(rule) == size


def vars_of(state: EcoState) -> list[object]:
    return [getattr(state, name) for name in state.__dataclass_fields__]


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([1, 2, 3, 4, 8]),
    optimizer=st.sampled_from(["sgd", "adam"]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    size=st.floats(1e-12, 1e12),
    rate=st.floats(1e-6, 1e3),
    seed=st.integers(0, 1000),
)
def test_codes_stay_on_their_grid_and_states_finite(
    width: int, optimizer: str, rounding: str, size: float, rate: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    rule = EcoRule(optimizer=optimizer, rounding=rounding)  # type: ignore[arg-type]
    codes = torch.randint(0, 2**width, (4, 32), generator=draw).to(torch.uint8)
    state = begin(codes, rule, rate=rate)
    for _ in range(5):
        gradient = size * torch.randn(4, 32, generator=draw)
        codes, state = update(
            codes, gradient, state, rule, rate=rate, next_rate=rate, width_bits=width, draw=draw
        )
        assert codes.dtype == torch.uint8 and int(codes.max()) < 2**width
        assert bool(torch.isfinite(state.momentum).all())


def test_stochastic_rounding_is_right_on_average() -> None:
    codes = torch.full((1, 20000), 3, dtype=torch.uint8)
    rule = EcoRule(rounding="stochastic")
    state = begin(codes, rule, rate=3.0)
    draw = torch.Generator().manual_seed(0)
    gradient = torch.full(codes.shape, -1.0)  # 0.3 upwards
    codes, state = update(
        codes, gradient, state, rule, rate=3.0, next_rate=3.0, width_bits=4, draw=draw
    )
    # A standard deviation of the mean is 0.0032.
    assert float(codes.float().mean()) == pytest.approx(3.3, abs=0.015)


def test_rules_that_mean_nothing_are_refused() -> None:
    for wrong in ({"beta1": 0.0}, {"beta1": 1.0}, {"beta2": 1.0}):
        with pytest.raises(ValueError, match="betas"):
            EcoRule(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SGD"):
        EcoRule(optimizer="adam", feedback="exact")
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    for rule in (EcoRule(optimizer="adam"), EcoRule(rounding="stochastic")):
        assert not takes_residual(rule)
        with pytest.raises(ValueError, match="residual"):
            begin(codes, rule, rate=0.1, residual=torch.zeros(1, 32))
