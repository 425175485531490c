"""Plan of a pack: every decision and every refusal, before anything is written."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_tool.artifacts.bundle_manifest import BundleBuddies
from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import PackPlan, Quantizer
from moe_tool.artifacts.precision import Precision, ReplicaPrecision
from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.budget.table_choice import AUTO_ROWS, RowsRequest
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_spec import BundleSpec, planned_forms
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.models.tokenizer import tokenizer_sha256
from moe_tool.packing.in_place import placed_forms, require_in_place
from moe_tool.packing.pack_inputs import PackInputs, ProfileFacts
from moe_tool.packing.pack_memory import PackMemory, plan_pack_memory
from moe_tool.packing.pack_options import PackOptions
from moe_tool.packing.plan_fit import planned_residents, require_plan_fits
from moe_tool.packing.primary_forms import PrimaryForms, primary_forms
from moe_tool.quantizers.registry import QUANTIZERS

_Replicas = Mapping[ReplicaPrecision, frozenset[ExpertKey]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackJob:
    """All decisions about a bundle."""

    folder: Path
    """Folder of the checkpoint"""
    tokenizer: Path
    """Folder of the tokenizer"""
    out: Path
    spec: BundleSpec
    skeleton: Precision
    quantizer: Quantizer
    plan: PackPlan | None
    profile: ProfileFacts
    buddies: BundleBuddies | None
    tokens: TracedTokens | None
    """Tokens for a second pass through the model, if forms are fitted or measured; None: experts
    are packed by their weights alone"""
    hidden_bytes: int
    """Limit of the hidden states carried from layer to layer"""
    loader: SkeletonLoader
    """Loader of the checkpoint's skeleton, for the one forward that proves the bundle"""
    rows: RowsRequest
    """Embedding tables that stay out of memory, now and by default in a run"""


def plan_pack(
    options: PackOptions,
    opened: OpenedModel,
    folder: Path,
    inputs: PackInputs,
    *,
    tokenizer: Path | None = None,
) -> PackJob:
    """Return the job of a pack.

    Raises:
        BudgetError: the memory budget is too small; the hint names one that is not.
        UsageError: options contradict each other or the model.
        WrongModelError: the plan belongs to another model.
        CorruptArtifactError: the plan's bits do not fit the model.
    """
    plan, profile = options.plan, inputs.profile
    if plan is not None:
        require_plan_fits(options, plan, opened.identity, has_heat=profile.heat is not None)
    shape = opened.shape
    floats = primary_forms(options, shape)  # codes on the disk change neither tokens nor nesting
    _require_no_channels(options)
    reason = _needs_tokens(options, floats, _replicas(options, floats, shape))
    tokens = None if reason is None else _tokens(profile, reason)
    loader = SkeletonLoader(folder, opened.checkpoint)
    memory = _memory(options, opened, loader, tokens, is_nested=floats.is_nested)
    primaries = _with_codes_kept(floats, options, opened)
    replicas = _replicas(options, primaries, shape)
    forms = planned_forms(primaries.experts, replicas)
    if options.in_place:
        require_in_place(opened, folder, forms)
    return PackJob(
        folder=folder,
        tokenizer=tokenizer or folder,
        out=options.out,
        spec=BundleSpec(
            identity=opened.identity.model_copy(update={"full": profile.full_hash}),
            shape=shape,
            order=profile.order,
            forms=forms,
            placed=placed_forms(forms) if options.in_place else frozenset(),
            removed=primaries.removed,
            made_from=_made_from(options, inputs, replicas, folder=folder, tokenizer=tokenizer),
        ),
        skeleton=options.skeleton,
        quantizer=options.quantizer,
        plan=plan,
        profile=profile,
        buddies=inputs.buddies,
        tokens=tokens,
        hidden_bytes=memory.hidden_bytes,
        loader=loader,
        rows=options.rows,
    )


def _memory(
    options: PackOptions,
    opened: OpenedModel,
    loader: SkeletonLoader,
    tokens: TracedTokens | None,
    *,
    is_nested: bool,
) -> PackMemory:
    on_disk = loader.choose(options.rows)
    return plan_pack_memory(
        opened,
        n_tokens=0 if tokens is None else tokens.ids.size,
        is_nested=is_nested,
        in_place=options.in_place,
        in_turn_bytes=loader.in_turn_bytes(on_disk),
        on_disk={name: loader.tables[name] for name in on_disk},
        asked=options.memory_bytes,
    )


def _with_codes_kept(
    floats: PrimaryForms, options: PackOptions, opened: OpenedModel
) -> PrimaryForms:
    """Return the forms with native experts in the checkpoint's own codes, where it has any."""
    if not any(precision.kind == "native" for precision in floats.experts):
        return floats
    return primary_forms(options, opened.shape, opened.kept_precision())


def _require_no_channels(options: PackOptions) -> None:
    """Refuse experts in channels beside a plan."""
    if options.channels is not None and options.plan is not None:
        raise UsageError(
            f"--sparse-experts {options.channels.name} beside --plan: plans do not know experts in "
            "channels",
            hint="leave one of them out",
        )


def _replicas(options: PackOptions, primaries: PrimaryForms, shape: MoeShape) -> _Replicas:
    """Return the experts of each replica: those with a dearer primary form, if a plan has a use for
    it."""
    ranks = [form.rank for form in options.replicas if form.kind == "low-rank"]
    too_wide = [rank for rank in ranks if rank > shape.expert_hidden]
    if too_wide:
        raise UsageError(
            f"--replicas rank{max(too_wide)}: the experts are {shape.expert_hidden} wide",
            hint="a rank that saves something is a small part of the width",
        )
    planned = None if options.plan is None else planned_residents(options.plan, options.replicas)
    found: dict[ReplicaPrecision, frozenset[ExpertKey]] = {}
    for form in options.replicas:
        dearer = [keys for own, keys in primaries.experts.items() if own.order_key < form.order_key]
        if not dearer:
            raise UsageError(
                f"--replicas {form.name} beside {options.primary_option}: a replica is cheaper "
                "than the expert, and no expert has more bits",
                hint="name fewer bits, or leave --replicas out",
            )
        experts = frozenset().union(*dearer)
        if planned is not None:
            experts &= planned[form.name]
        if experts:
            found[form.with_zeros(QUANTIZERS[options.quantizer].makes_zeros)] = experts
    return found


def _tokens(profile: ProfileFacts, reason: str) -> TracedTokens:
    if profile.tokens is None:
        raise UsageError(
            f"{reason}, and there is no profile", hint="--profile FILE, of moe-tool profile"
        )
    return profile.tokens


def _needs_tokens(options: PackOptions, primaries: PrimaryForms, replicas: _Replicas) -> str | None:
    """Return why a profile's tokens have to go through the model; None if they need not."""
    if options.channels is not None:
        name = options.channels.name
        return f"--sparse-experts {name}: thresholds are measured on a profile's tokens"
    if replicas:
        return "--replicas are fitted to a profile's tokens and priced on them"
    if primaries.is_nested:
        bits = options.bits_name
        return f"--bits {bits}: the base of nested bits is priced on a profile's tokens"
    if QUANTIZERS[options.quantizer].needs_inputs and primaries.has_codes:
        return f"--quantizer {options.quantizer} needs the experts' inputs"
    return None


def _made_from(
    options: PackOptions,
    inputs: PackInputs,
    replicas: _Replicas,
    *,
    folder: Path,
    tokenizer: Path | None,
) -> dict[str, str]:
    found = {
        "bits": options.bits_name,
        "skeleton_bits": options.skeleton.name,
        "profile": inputs.profile.sha256 or "none",
        "buddies": inputs.buddies_name,
    }
    if tokenizer is not None and tokenizer != folder:
        found["tokenizer"] = tokenizer_sha256(tokenizer)
    if replicas:
        found["replicas"] = ",".join(form.name for form in replicas)
    if options.channels is not None:
        found["sparse_experts"] = options.channels.name
    if options.in_place:
        found["in_place"] = "yes"
    if options.rows != AUTO_ROWS:
        found["rows"] = options.rows.word
    if options.quantizer != "rtn":
        found["quantizer"] = options.quantizer
    if options.robust:
        found["robust"] = str(options.robust)
    if options.plan is not None:
        found["plan"] = hashlib.sha256(options.plan.model_dump_json().encode()).hexdigest()
    return found
