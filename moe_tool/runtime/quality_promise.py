"""Promise of quality by a bundle's calibration or plan, and its limits."""

import math

from moe_tool.artifacts.bundle_manifest import BundleManifest, Calibration
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.runtime.policy_choice import ChosenPolicy
from moe_tool.runtime.quality_account import QualityAccount


def open_account(manifest: BundleManifest, policy: ChosenPolicy) -> QualityAccount:
    """Return the account of a run, limited if the policy is the calibrated or planned one."""
    calibration, plan = manifest.calibration, manifest.plan
    if calibration is not None and policy.name == calibration.policy:
        return QualityAccount(nats_per_price=calibration.nats_per_price, limit=calibration.max_kl)
    if plan is not None and plan.max_kl is not None and policy.name == plan.policy:
        return QualityAccount(limit=plan.max_kl - plan.prediction.kl_of_bits)
    if not math.isinf(policy.policy.target_kl):
        return QualityAccount(limit=policy.policy.target_kl)
    return QualityAccount()


def quality_note(manifest: BundleManifest, policy: ChosenPolicy, *, n_slots: int) -> str | None:
    """Return a note on expected quality, None without one; `n_slots` is the room for experts."""
    calibration, plan = manifest.calibration, manifest.plan
    if calibration is not None and policy.name == calibration.policy:
        return _calibrated(calibration, n_slots)
    if plan is not None and policy.name == plan.policy:
        return _planned(plan, n_slots)
    return None


def _calibrated(calibration: Calibration, n_slots: int) -> str:
    low, high = calibration.quality.kl_ci95
    found = (
        f"calibrated on {calibration.domain_names}: KL {calibration.quality.kl:.4f} "
        f"[{low:.4f}, {high:.4f}] nats per token"
    )
    if n_slots < calibration.expert_slots:
        return (
            f"{found} with room for {calibration.expert_slots} experts, not {n_slots}: the "
            f"limit of {calibration.max_kl:g} is kept by the price list alone"
        )
    return (
        f"{found}, to stay below {calibration.max_kl:g}; text of other kinds is judged as it runs"
    )


def _planned(plan: PackPlan, n_slots: int) -> str:
    prediction = plan.prediction
    expected = 0.0 if prediction.kl is None else prediction.kl - prediction.kl_of_bits
    found = f"planned: expected KL {expected:.2g} nats per token beside that of the bits"
    if n_slots < prediction.expert_slots:
        found += f" with room for {prediction.expert_slots} experts, not {n_slots}"
    return f"{found}; prices, not measured: moe-tool calibrate measures"
