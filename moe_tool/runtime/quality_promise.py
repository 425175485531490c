"""What a calibrated bundle promises of a run, and where it does not hold."""

from moe_tool.artifacts.bundle_manifest import Calibration
from moe_tool.runtime.policy_choice import ChosenPolicy
from moe_tool.runtime.quality_account import QualityAccount


def open_account(calibration: Calibration | None, policy: ChosenPolicy) -> QualityAccount:
    """Return the account of a run: with the calibrated limit where the policy is the calibrated
    one."""
    if calibration is None or policy.name != calibration.policy:
        return QualityAccount()
    return QualityAccount(nats_per_price=calibration.nats_per_price, limit=calibration.max_kl)


def quality_note(
    calibration: Calibration | None, policy: ChosenPolicy, *, n_slots: int
) -> str | None:
    """Return what is to be said of quality before the first token; None for nothing.

    Args:
        calibration: of the bundle.
        policy: of the run.
        n_slots: full experts that the run's budget has room for.
    """
    if calibration is None or policy.name != calibration.policy:
        return None
    low, high = calibration.quality.kl_ci95
    found = f"calibrated: KL {calibration.quality.kl:.4f} [{low:.4f}, {high:.4f}] nats per token"
    if n_slots < calibration.expert_slots:
        return (
            f"{found} with room for {calibration.expert_slots} experts, here are {n_slots}: the "
            f"limit of {calibration.max_kl:g} is kept by the price list alone"
        )
    return f"{found}, to stay below {calibration.max_kl:g}"
