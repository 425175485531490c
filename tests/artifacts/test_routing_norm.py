"""A window's score is its distance to the nearest domain; a norm that contradicts itself is
refused."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from moe_tool.artifacts.bundle_sections import ROUTING_NORM, Section, parse_section
from moe_tool.artifacts.routing_norm import WindowScore, window_score
from tests.made_norms import make_norm, norm_body


def test_score_by_hand() -> None:
    # Scaled distances to wiki are (4 / 2, 1) and to code (0, 1). Along the direction the variance
    # is 4, beside it 0.5: wiki 2^2 / 4 + 1 / 0.5 = 3, code 0 + 1 / 0.5 = 2, over two logits.
    score = window_score(make_norm())
    assert score.rate(np.array([[4.0, 1.0], [0.0, 0.0]])).tolist() == [1.0, 0.0]
    # In between, 1 away from either: 1 / 4 over two logits.
    assert score.rate(np.array([[2.0, 0.0]])).tolist() == [0.125]


def test_score_is_the_distance_by_the_inverse_of_the_covariance() -> None:
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.normal(size=(7, 7)))[0][:3]
    score = WindowScore(
        scale=rng.uniform(0.5, 2, 7),
        means=rng.normal(size=(2, 7)),
        directions=vectors,
        spread=np.array([9.0, 4.0, 2.0]),
        rest=0.3,
    )
    scaled = 0.3 * np.eye(7) + sum(
        (spread - 0.3) * np.outer(vector, vector)
        for spread, vector in zip(score.spread, vectors, strict=True)
    )
    inverse = np.linalg.inv(scaled * np.outer(score.scale, score.scale))
    windows = rng.normal(size=(5, 7))
    wanted = [
        min((window - mean) @ inverse @ (window - mean) / 7 for mean in score.means)
        for window in windows
    ]
    np.testing.assert_allclose(score.rate(windows), wanted, rtol=1e-12)


def _layer(**changed: Any) -> dict[str, Any]:
    first, second = norm_body()["layers"]
    return norm_body(layers=[first | changed, second])


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (norm_body(rest=0.0), "rest"),
        (norm_body(rest=float("nan")), "rest"),
        (norm_body(spread=[-1.0]), "spread"),
        (norm_body(spread=[1.0, 1.0]), "directions"),
        (norm_body(domains=["wiki"]), "domains"),
        (norm_body(domains=["x"] * 17), "domains"),
        (norm_body(thresholds=[1.0]), "thresholds"),
        (norm_body(thresholds=[1.0, 0.0]), "thresholds"),
        (norm_body(held_out_alarms=51), "more false alarms"),
        (norm_body(layers=norm_body()["layers"][:1] * 2), "listed twice"),
        (norm_body(strange=1), "strange"),
        (_layer(scale=[0.0]), "scale"),
        (_layer(scale=[1.0, 1.0]), "row"),
        (_layer(means=[[0.0], [float("inf")]]), "means"),
        (_layer(means=[[0.0]]), "domains"),
        (_layer(experts=[1, 0]), "ascend"),
        (_layer(experts=[]), "experts"),
        (_layer(directions=[["1"]]), "directions"),
    ],
)
def test_nonsense_is_refused(body: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, ValidationError), match=complaint):
        parse_section(ROUTING_NORM, Section(required=False, body=body))
