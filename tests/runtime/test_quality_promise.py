"""What a run says of a calibration: on which text it was measured, and with how much room."""

from types import SimpleNamespace
from typing import Any

import pytest

from moe_tool.artifacts.bundle_manifest import Calibration, QualityFigure
from moe_tool.runtime.quality_promise import quality_note

QUALITY = QualityFigure(kl=0.02, kl_ci95=(0.01, 0.03), tokens=100)


def note(*domains: str, n_slots: int) -> str:
    calibration = Calibration(
        policy="priced",
        max_kl=0.05,
        quality=QUALITY,
        domains=dict.fromkeys(domains, QUALITY),
        sources=("a=b",),
        expert_slots=8,
        nats_per_price=1.0,
    )
    manifest: Any = SimpleNamespace(calibration=calibration, plan=None)
    policy: Any = SimpleNamespace(name="priced")
    found = quality_note(manifest, policy, n_slots=n_slots)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("domains", "named"), [(("wiki", "reviews"), "wiki, reviews"), ((), "unnamed text")]
)
def test_the_text_behind_the_limit_is_named(domains: tuple[str, ...], named: str) -> None:
    kept = note(*domains, n_slots=8)
    assert kept == (
        f"calibrated on {named}: KL 0.0200 [0.0100, 0.0300] nats per token, to stay below 0.05; "
        "text of other kinds is judged as it runs"
    )
    scarce = note(*domains, n_slots=7)
    assert scarce.startswith(f"calibrated on {named}: ") and "8 experts, not 7" in scarce
