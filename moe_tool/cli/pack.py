"""`moe-tool pack`: compile a checkpoint into a bundle."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moe_tool.artifact_folder import (
    BUDDIES_SUFFIX,
    DEFAULT_FOLDER,
    PROFILE_SUFFIX,
    newest_artifact,
)
from moe_tool.budget.sizes import format_bytes
from moe_tool.cli.console import Output, open_output
from moe_tool.cli.options import (
    JsonOption,
    ModelArgument,
    OfflineOption,
    ProfilesOption,
)
from moe_tool.errors import MoeToolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_tool.artifacts.identity import ModelIdentity
    from moe_tool.artifacts.pack_plan import PackPlan
    from moe_tool.packing.prove_bundle import BundleProof
    from moe_tool.packing.write_bundle import PackReport


_ProfileOption = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="Order the experts by this profile.",
        show_default="newest of this model, or none",
    ),
]
_BuddiesOption = Annotated[
    Path | None,
    typer.Option(
        "--buddies",
        metavar="FILE",
        help="Include the stand-ins of this buddy map.",
        show_default="newest of this model, or none",
    ),
]
_PlanOption = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Follow this plan: its bits for packing, its settings as the defaults of `run`.",
        show_default=False,
    ),
]
_BitsOption = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="BITS",
        help="Bits of an expert's weights: 8, 4, 3, 2 or 1, where 2:128 shares a scale among "
        "128 inputs instead of 64; 2+2 or 2+1: nested, 4 or 3 bits of which the first 2 are a "
        "complete expert; native keeps the checkpoint's dtype, bit for bit.",
        show_default="native, or the plan's",
    ),
]
_SkeletonBitsOption = Annotated[
    Literal["native", "8", "4"] | None,
    typer.Option(
        "--skeleton-bits",
        help="Bits of the matrices outside the experts: attention, shared experts, dense "
        "layers, head. Routers, norms and the embedding keep the checkpoint's dtype; a head "
        "tied to the embedding is stored again with these bits. Lossy below native, like --bits: "
        "`evaluate --reference` measures the cost.",
        show_default="native, or the plan's",
    ),
]
_ReplicasOption = Annotated[
    str | None,
    typer.Option(
        "--replicas",
        metavar="LIST",
        help="Cheaper forms of every expert for lossy policies: bits (8, 4, 3, 2, 1; 2:128 shares "
        "a scale among 128 inputs instead of 64) and low-rank maps, e.g. 3,2:128,rank16. Fitted "
        "and priced on the profile's tokens.",
        show_default="none, or the plan's",
    ),
]
_SparseExpertsOption = Annotated[
    str | None,
    typer.Option(
        "--sparse-experts",
        metavar="SELECTOR",
        help="Store gated experts channel by channel, for `run --sparse-experts`: up2, up3, "
        "gate2 or gate3 names the matrix that selects a token's channels, and its bits; it stays "
        "in memory for every expert. The rest has 4 bits, or 8 with gate2:8. Thresholds are "
        "measured on the profile's tokens.",
        show_default=False,
    ),
]
_QuantizerOption = Annotated[
    str | None,
    typer.Option(
        "--quantizer",
        metavar="NAME",
        help="Quantizer of the experts, {quantizers}. Those that use the profile's tokens are "
        "slower and lose far less.",
        show_default="rtn, or the plan's",
    ),
]
_MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Budget of the whole process while packing, e.g. 4GiB; to keep it, fewer of the "
        "profile's tokens may be used.",
        show_default="no limit",
    ),
]
_OutOption = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="The bundle. An interrupted one is resumed."),
]


def pack(
    model: ModelArgument,
    profile: _ProfileOption = None,
    buddies: _BuddiesOption = None,
    plan: _PlanOption = None,
    bits: _BitsOption = None,
    skeleton_bits: _SkeletonBitsOption = None,
    replicas: _ReplicasOption = None,
    sparse_experts: _SparseExpertsOption = None,
    quantizer: _QuantizerOption = None,
    memory: _MemoryOption = None,
    out: _OutOption = Path("bundle"),
    profiles: ProfilesOption = DEFAULT_FOLDER,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Compile a checkpoint into a bundle. `run` reads it expert by expert."""
    with open_output(as_json=json) as output:
        from moe_tool.packing.pack_options import parse_pack_options

        options = parse_pack_options(
            out=out,
            bits=bits,
            skeleton_bits=skeleton_bits,
            replicas=replicas,
            sparse_experts=sparse_experts,
            quantizer=quantizer,
            plan=None if plan is None else _read_plan(plan),
            memory=memory,
        )

        from moe_tool.models.locate import locate_model

        located = locate_model(model, offline=offline, announce=output.say)

        from moe_tool.models.architecture import open_model
        from moe_tool.packing.pack_bundle import pack_opened

        opened = open_model(located)
        with opened.checkpoint:
            profile = profile or _profile_of(options.plan, profiles, opened.identity, output)
            buddies = buddies or _newest_buddies(profiles, opened.identity, output)
            report = pack_opened(
                opened,
                located.folder,
                options,
                profile=profile,
                buddies=buddies,
                progress=output.progress,
            )
        _show(report, output, is_sparse=options.channels is not None)
        output.result(asdict(report) | {"profile": profile, "buddies": buddies, "plan": plan})


def _show(report: "PackReport", output: Output, *, is_sparse: bool) -> None:
    skeleton = "native" if report.skeleton_bits == "native" else f"{report.skeleton_bits} bits"
    output.say(
        f"wrote {report.bundle}/: {format_bytes(report.bytes)}, of which experts "
        f"{format_bytes(report.expert_bytes)} at {report.bits_per_weight:.2f} bits per weight "
        f"and skeleton {format_bytes(report.skeleton_bytes)}, {skeleton}; "
        f"{report.seconds:.1f} s, peak memory {format_bytes(report.peak_rss_bytes)}"
    )
    if report.proof is not None:
        output.say(_proven(report.proof))
    if report.output_error is not None:
        output.say(f"relative error of the experts' outputs: {report.output_error:.2g}")
    if report.unrouted:
        output.say(_unrouted(report.unrouted))
    sparse = " --sparse-experts 0.7" if is_sparse else ""
    output.say(f'next: moe-tool run {report.bundle}/{sparse} --prompt "The list"')


def _proven(proof: "BundleProof") -> str:
    found = {
        "equal": "every bit of the logits is the checkpoint's",
        "close": f"the logits are the checkpoint's, up to {proof.difference:.2g} of rounding",
    }.get(proof.rule, f"{proof.kl:.3g} nats per token away from the checkpoint")
    return (
        f"proven by a forward of {proof.tokens} tokens through both: {found}; "
        f"{format_bytes(proof.bytes_read)} read, {proof.seconds:.1f} s"
    )


def _unrouted(experts: "Sequence[tuple[int, int]]") -> str:
    named = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:4])
    more = f" and {len(experts) - 4} more" if len(experts) > 4 else ""
    return (
        f"fitted to other experts' tokens, because the profile routes few or none to them: "
        f"{named}{more}; a larger profile may help"
    )


def _read_plan(path: Path) -> "PackPlan":
    from moe_tool.formats.policy_names import read_plan

    return read_plan(path)


def _profile_of(
    plan: "PackPlan | None", folder: Path, identity: "ModelIdentity", output: Output
) -> Path | None:
    """Return the profile that the plan was made from; without it, the newest of the model."""
    from moe_tool.formats.profile_hdf5 import ProfileReader

    def is_planned(path: Path) -> bool:
        try:
            with ProfileReader.open(path) as reader:
                return plan is not None and reader.sha256 == plan.profile_sha256
        except MoeToolError:
            return False

    found = None if plan is None else newest_artifact(folder, PROFILE_SUFFIX, fits=is_planned)
    if found is not None:
        output.say(f"profile: {found}, which the plan was made from")
        return found
    if plan is not None:
        output.say(f"profile: the one that the plan was made from is not in {folder}/")
    return _newest_profile(folder, identity, output)


def _newest_profile(folder: Path, identity: "ModelIdentity", output: Output) -> Path | None:
    from moe_tool.formats.profile_hdf5 import ProfileReader

    def fits(path: Path) -> bool:
        try:
            with ProfileReader.open(path) as reader:
                return reader.header.identity.matches(identity)
        except MoeToolError:
            return False

    found = newest_artifact(folder, PROFILE_SUFFIX, fits=fits)
    _say_which("profile", found, folder, identity, output)
    return found


def _newest_buddies(folder: Path, identity: "ModelIdentity", output: Output) -> Path | None:
    from moe_tool.artifacts.buddy_map import BuddyMap
    from moe_tool.formats.json_artifact import read_json_artifact

    def fits(path: Path) -> bool:
        try:
            return read_json_artifact(path, BuddyMap).identity.matches(identity)
        except MoeToolError:
            return False

    found = newest_artifact(folder, BUDDIES_SUFFIX, fits=fits)
    _say_which("buddies", found, folder, identity, output)
    return found


def _say_which(
    what: str, found: Path | None, folder: Path, identity: "ModelIdentity", output: Output
) -> None:
    if found is None:
        output.say(f"{what}: none of {identity.name} in {folder}/, packing without")
    else:
        output.say(f"{what}: {found} (the newest of {identity.name} in {folder}/)")
