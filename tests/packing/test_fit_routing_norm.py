"""A norm is silent on held-out text of the profile's kind, and tells other text."""

from collections.abc import Callable

import numpy as np

from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.artifacts.routing_norm import RoutingNorm
from moe_tool.packing.fit_routing_norm import fit_routing_norm, is_unlike, watched_experts

LAYERS, N_EXPERTS, SEQ_LEN = (0, 2), 8, 128
CENTRES = np.array([[0.0] * 16, [2.0] * 8 + [-2.0] * 8])


def made_logits(domain: np.ndarray, *, seed: int, shift: float = 0.0) -> np.ndarray:
    """Logits of sequences around their domain's centre, [N, S, 16]: topics move the first half of
    the values together, and `shift` moves one value that topics leave alone."""
    rng = np.random.default_rng(seed)
    topic = rng.normal(size=(len(domain), 1, 1)) * np.repeat([1.0, 0.0], 8)
    noise = rng.normal(size=(len(domain), SEQ_LEN, 16))
    logits = CENTRES[domain][:, None] + topic + noise
    logits[..., 15] += shift
    return logits.astype(np.float16)


def traced(domain: np.ndarray) -> TracedTokens:
    ids = np.zeros((len(domain), SEQ_LEN), np.int32)
    return TracedTokens(
        ids=ids,
        domain=domain.astype(np.int16),
        document=ids,
        held_out=np.arange(len(domain)) % 4 == 3,
        domains=("wiki", "code"),
    )


def by_layer(logits: np.ndarray) -> Callable[[int], np.ndarray]:
    def of(layer: int) -> np.ndarray:
        at = LAYERS.index(layer) * N_EXPERTS
        return logits[..., at : at + N_EXPERTS].reshape(-1, N_EXPERTS)

    return of


def fitted(n_sequences: int = 160) -> RoutingNorm | None:
    domain = np.arange(n_sequences) * 2 // n_sequences
    logits = by_layer(made_logits(domain, seed=0))
    return fit_routing_norm(traced(domain), LAYERS, N_EXPERTS, logits)


def alarms(norm: RoutingNorm, logits: np.ndarray) -> float:
    halves = logits.astype(float).reshape(-1, 64, 16)
    means = np.stack([halves[:, :32].mean(axis=1), halves.mean(axis=1)])
    return float(is_unlike(norm, means).mean())


def test_the_norm_fires_on_other_text_alone() -> None:
    norm = fitted()
    assert norm is not None and norm.domains == ("wiki", "code")
    assert norm.held_out_windows == 80 and norm.held_out_alarms <= 2
    domain = np.arange(400) % 2
    assert alarms(norm, made_logits(domain, seed=1)) <= 0.02
    # A shift of 2 is as far as a topic of two deviations goes, but in a direction without topics.
    assert alarms(norm, made_logits(domain, seed=1, shift=2.0)) >= 0.95


def test_the_same_profile_gives_the_same_norm() -> None:
    assert fitted() == fitted()


def test_a_short_profile_gives_no_norm() -> None:
    assert fitted(60) is None  # 45 in-sample sequences of two windows


def test_many_layers_watch_few_experts_each() -> None:
    assert watched_experts(6, 32).tolist() == list(range(32))
    found = watched_experts(48, 128)
    assert len(found) == 16 and found.tolist() == list(range(0, 128, 8))
