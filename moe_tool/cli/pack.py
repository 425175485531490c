"""`moe-tool pack`: compile a checkpoint into a bundle."""

from dataclasses import asdict, dataclass, replace
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
from moe_tool.cli.console import Output
from moe_tool.cli.lookup import pack_rows
from moe_tool.cli.options import (
    ModelArgument,
    OfflineOption,
    ProfilesOption,
    RevisionOption,
    RobustOption,
    TokenizerOption,
)
from moe_tool.cli.verb import options_from, verb
from moe_tool.errors import MoeToolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moe_tool.artifacts.identity import ModelIdentity
    from moe_tool.artifacts.pack_plan import PackPlan
    from moe_tool.packing.pack_options import PackOptions
    from moe_tool.packing.prove_bundle import BundleProof
    from moe_tool.packing.write_bundle import PackReport


@dataclass(frozen=True, slots=True, kw_only=True)
class PackArguments:
    model: ModelArgument
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Order the experts by this profile.",
            show_default="newest of this model, or none",
        ),
    ] = None
    buddies: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Include the stand-ins of this buddy map.",
            show_default="newest of this model, or none",
        ),
    ] = None
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Follow this plan: its bits for packing, its settings as the defaults of `run`.",
        ),
    ] = None
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help="Bits of an expert's weights: 8, 4, 3, 2 or 1, where 2:128 shares a scale among "
            "128 inputs instead of 64; 2+2 or 2+1: nested, 4 or 3 bits of which the first 2 are a "
            "complete expert; native keeps the checkpoint's floats, or a quantized one's codes, "
            "bit for bit. Lookup experts (mole) become rows: native, 8 or nf4.",
            show_default="native, or the plan's",
        ),
    ] = None
    skeleton_bits: Annotated[
        Literal["native", "8", "4"] | None,
        typer.Option(
            help="Bits of the matrices outside the experts: attention, shared experts, dense "
            "layers, head. Routers, norms and the embedding keep the checkpoint's dtype; a head "
            "tied to the embedding is stored again with these bits. Lossy below native, like "
            "--bits: `evaluate --reference` measures the cost.",
            show_default="native, or the plan's",
        ),
    ] = None
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Cheaper forms of every expert for lossy policies: bits (8, 4, 3, 2, 1; 2:128 "
            "shares a scale among 128 inputs instead of 64) and low-rank maps, e.g. "
            "3,2:128,rank16. Fitted and priced on the profile's tokens.",
            show_default="none, or the plan's",
        ),
    ] = None
    sparse_experts: Annotated[
        str | None,
        typer.Option(
            metavar="SELECTOR",
            help="Store gated experts channel by channel, for `run --sparse-experts`: up2, up3, "
            "gate2 or gate3 names the matrix that selects a token's channels, and its bits; it "
            "stays in memory for every expert. The rest has 4 bits, or 8 with gate2:8. Thresholds "
            "are measured on the profile's tokens.",
        ),
    ] = None
    quantizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantizer of the experts, {quantizers}. Those that use the profile's tokens are "
            "slower and lose far less.",
            show_default="rtn, or the plan's",
        ),
    ] = None
    robust: RobustOption = None
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Leave experts of native bits in the checkpoint's files, which `run` then reads: "
            "only the rest is written, and the checkpoint has to stay where it is.",
        ),
    ] = False
    discard_source: Annotated[
        bool,
        typer.Option(
            "--discard-source",
            help="Delete each downloaded shard of a hub model from the Hugging Face cache once "
            "everything in it is packed. An interrupted pack goes on without them.",
        ),
    ] = False
    rows: Annotated[
        str,
        typer.Option(
            metavar="auto|SIZE|none",
            help="Embedding tables that packing holds no more than a piece of, and of which `run` "
            "reads rows: auto, of 64MiB or more, in `run` where memory has no room for everything; "
            "those of SIZE or more, always; none. `run --rows` overrides it.",
        ),
    ] = "auto"
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Budget of the whole process while packing, e.g. 4GiB; to keep it, fewer of the "
            "profile's tokens may be used.",
            show_default="no limit",
        ),
    ] = None
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The bundle. An interrupted one is resumed.")
    ] = Path("bundle")
    profiles: ProfilesOption = DEFAULT_FOLDER
    revision: RevisionOption = None
    tokenizer: TokenizerOption = None
    offline: OfflineOption = False


@verb
def pack(given: PackArguments, output: Output) -> None:
    """Compile a checkpoint into a bundle. `run` reads it expert by expert."""
    from moe_tool.formats.policy_names import read_plan
    from moe_tool.packing.pack_options import parse_pack_options

    plan = None if given.plan is None else read_plan(given.plan)
    # Only the model tells whether these bits are possible, and it may have to be downloaded.
    for_rows = (given.bits or "").strip().lower() == "nf4"
    options = None if for_rows else options_from(given, parse_pack_options, plan=plan)

    from moe_tool.formats.discarded_source import read_discarded
    from moe_tool.models.locate import locate_model

    located = locate_model(
        given.model,
        revision=given.revision,
        tokenizer=given.tokenizer,
        offline=given.offline,
        gone=read_discarded(given.out) if given.discard_source else None,
        announce=output.say,
    )

    from moe_tool.models.mole.load_mole import is_mole

    if is_mole(located.folder):
        pack_rows(given, located, output)
        return
    if options is None:
        raise UsageError(
            "--bits nf4 is a form of the rows of lookup experts, which this model does not have",
            hint="--bits 4 has as many bits for experts that are computed",
        )

    from moe_tool.models.architecture import open_model
    from moe_tool.packing.pack_bundle import pack_opened

    opened = open_model(located)
    with opened.checkpoint:
        profile = given.profile or _profile_of(plan, given.profiles, opened.identity, output)
        if given.robust is None and plan is None:
            options = replace(options, robust=_robust_share(profile, options, output))
        buddies = given.buddies or _newest_buddies(given.profiles, opened.identity, output)
        report = pack_opened(
            opened,
            located.folder,
            options,
            tokenizer=located.tokenizer_folder,
            hub=located.hub,
            offline=given.offline,
            profile=profile,
            buddies=buddies,
            progress=output.progress,
        )
    _show(report, output, is_sparse=options.channels is not None)
    inputs = {"profile": profile, "buddies": buddies, "plan": given.plan}
    output.result(asdict(report) | inputs | {"robust": options.robust})


def _robust_share(profile: Path | None, options: "PackOptions", output: Output) -> float:
    """Return the share for residents of a pack without a plan; 0 without a profile or prices."""
    from moe_tool.formats.profile_hdf5 import ProfileReader
    from moe_tool.planning.robust_share import share_for_pack

    if profile is None or options.bits is None or options.channels is not None:
        return 0.0
    with ProfileReader.open(profile) as reader:
        share = share_for_pack(reader, options.bits_name, options.replica_names)
        domains = ", ".join(reader.tokens.domains)
    output.say(f"residents: --robust {share:g}, by leaving out each of {domains}")
    return share


def _show(report: "PackReport", output: Output, *, is_sparse: bool) -> None:
    skeleton = "native" if report.skeleton_bits == "native" else f"{report.skeleton_bits} bits"
    experts = f"{report.bits_per_weight:.2f} bits per weight"
    written = ""
    if report.written_expert_bytes:
        written = f"experts {format_bytes(report.written_expert_bytes)} at {experts} and "
    output.say(
        f"wrote {report.bundle}/: {format_bytes(report.bytes)} (checkpoint: "
        f"{format_bytes(report.checkpoint_bytes)}), of which {written}skeleton "
        f"{format_bytes(report.skeleton_bytes)}, {skeleton}; "
        f"{report.seconds:.1f} s, peak memory {format_bytes(report.peak_rss_bytes)}"
    )
    if report.source is not None:
        stay = format_bytes(report.expert_bytes - report.written_expert_bytes)
        output.say(
            f"not written: experts, {stay} as records, stay in {report.source}/: leave it where it "
            "is, and as it is"
        )
    if report.proof is not None:
        output.say(_proven(report.proof))
    if report.freed:
        output.say(
            f"freed {format_bytes(sum(report.freed.values()))} of the Hugging Face cache: "
            f"{len(report.freed)} shards"
        )
    if report.output_error is not None:
        output.say(f"relative error of the experts' outputs: {report.output_error:.2g}")
    if report.unrouted:
        output.say(_unrouted(report.unrouted))
    sparse = " --sparse-experts 0.7" if is_sparse else ""
    output.say(f'next: moe-tool run {report.bundle}/{sparse} --prompt "The list"')


def _proven(proof: "BundleProof") -> str:
    away = f"{proof.kl:.3g} nats per token away from the checkpoint"
    found = {
        "equal": "every bit of the logits is the checkpoint's",
        "close": f"the logits are the checkpoint's, up to {proof.difference:.2g} of rounding",
        "bounded": f"{away}, at most {proof.most_kl:.3g} is allowed: that of knowing nothing",
        "finite": f"{away}, without a bound at 1 bit or with removed experts",
    }[proof.rule]
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


def _profile_of(
    plan: "PackPlan | None", folder: Path, identity: "ModelIdentity", output: Output
) -> Path | None:
    """Return the profile that the plan was made from; without it, the newest of the model."""
    from moe_tool.formats.profile_hdf5 import ProfileReader

    def is_planned(path: Path) -> bool:
        with ProfileReader.open(path) as reader:
            return plan is not None and reader.sha256 == plan.profile_sha256

    def fits(path: Path) -> bool:
        with ProfileReader.open(path) as reader:
            return reader.header.identity.matches(identity)

    if plan is not None:
        found = _newest(folder, PROFILE_SUFFIX, is_planned)
        if found is not None:
            output.say(f"profile: {found}, which the plan was made from")
            return found
        output.say(f"profile: the one that the plan was made from is not in {folder}/")
    found = _newest(folder, PROFILE_SUFFIX, fits)
    _say_which("profile", found, folder, identity, output)
    return found


def _newest_buddies(folder: Path, identity: "ModelIdentity", output: Output) -> Path | None:
    from moe_tool.artifacts.buddy_map import BuddyMap
    from moe_tool.formats.json_artifact import read_json_artifact

    def fits(path: Path) -> bool:
        return read_json_artifact(path, BuddyMap).identity.matches(identity)

    found = _newest(folder, BUDDIES_SUFFIX, fits)
    _say_which("buddies", found, folder, identity, output)
    return found


def _newest(folder: Path, suffix: str, fits: "Callable[[Path], bool]") -> Path | None:
    """Return the newest artifact that fits, past those that cannot be read."""

    def reads_and_fits(path: Path) -> bool:
        try:
            return fits(path)
        except MoeToolError:
            return False

    return newest_artifact(folder, suffix, fits=reads_and_fits)


def _say_which(
    what: str, found: Path | None, folder: Path, identity: "ModelIdentity", output: Output
) -> None:
    if found is None:
        output.say(f"{what}: none of {identity.name} in {folder}/, packing without")
    else:
        output.say(f"{what}: {found} (the newest of {identity.name} in {folder}/)")
