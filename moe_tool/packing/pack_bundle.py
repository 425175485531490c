"""The story of `pack`: read an expert, quantize it, write its record; then the skeleton, the
tokenizer and the manifest."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_tool.artifacts.buddy_map import BuddyMap
from moe_tool.artifacts.bundle_manifest import BundleBuddies, BundleManifest, LayerHeat, LayerPrices
from moe_tool.artifacts.identity import ModelIdentity, require_same_model
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.pack_plan import PackPlan, Quantizer
from moe_tool.artifacts.precision import (
    IntegerPrecision,
    ReplicaPrecision,
    replica_precisions,
)
from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.packing.own_forms import channel_forms, own_forms, parse_precision
from moe_tool.packing.pack_memory import plan_pack_memory
from moe_tool.packing.plan_fit import planned_residents, require_plan_fits, sha256_of_plan
from moe_tool.packing.prices import layer_prices
from moe_tool.packing.quantizers import needs_inputs
from moe_tool.packing.record_order import order_experts
from moe_tool.packing.skeleton_work import SkeletonWork
from moe_tool.packing.write_records import write_calibrated, write_records
from moe_tool.policies.hot_set import ExpertKey
from moe_tool.progress import SILENT, Progress

# Everything a tokenizer, a chat template or `generate` may read; nothing else of the checkpoint's
# folder is copied.
_COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_COMPANION_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What `pack` wrote."""

    bundle: Path
    bytes: int
    """All files"""
    expert_bytes: int
    """Expert records, alignment included, without replicas"""
    replica_bytes: int
    skeleton_bytes: int
    skeleton_bits: str
    """native, 8 or 4"""
    bits_per_weight: float
    """Of the expert records, scales and alignment included"""
    seconds: float
    peak_rss_bytes: int
    error: float | None
    """Of the experts' outputs, relative, on held-out tokens: mean over experts; None: not
    measured"""
    unrouted: tuple[ExpertKey, ...]
    """Experts that few tokens or none were sent to: fitted to those of others"""
    resumed_records: int
    """Records found finished from an interrupted run"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """What a profile adds to a bundle."""

    sha256: str | None
    heat: tuple[LayerHeat, ...] | None
    order: list[tuple[int, int]]
    """(layer, expert) in file order"""
    full_hash: str | None
    """Of the checkpoint: the profile read every tensor of it"""
    prices: tuple[LayerPrices, ...] | None
    tokens: TracedTokens | None


def pack_bundle(
    model: LocatedModel,
    *,
    out: Path,
    bits: str = "native",
    skeleton_bits: str = "native",
    replicas: str = "",
    sparse_experts: str = "",
    quantizer: Quantizer = "rtn",
    profile: Path | None = None,
    buddies: Path | None = None,
    plan: PackPlan | None = None,
    memory_bytes: int | None = None,
    progress: Progress = SILENT,
) -> PackReport:
    """Compile a checkpoint into a bundle, one expert in memory at a time.

    An interrupted run is resumed when called again with the same model and options.

    Args:
        model: where the checkpoint lies.
        out: the bundle's folder; until it is finished its name ends in `.part`.
        bits: of the experts: "native", "4", "2:128"; "mixed": as the plan says.
        skeleton_bits: of the matrices outside experts and routers: "native", "8" or "4".
        replicas: cheaper forms of every expert, for lossy policies: "3,2:128,rank16", see
            `replica_precisions`.
        sparse_experts: experts in channels that can be used alone, see `channel_precision`: "up2";
            needs the profile's tokens.
        quantizer: how codes are chosen; fitted and gptq need the profile's tokens.
        profile: HDF5 file of this model: gives record order, heat and prices, and the tokens that
            replicas are fitted to and measured on.
        buddies: buddy map of this model.
        plan: goes into the manifest, for `run` to follow; of this model and these bits.
        memory_bytes: budget of the whole process; None: what packing takes.
        progress: told about every record.

    Raises:
        BudgetError: the budget is too small: with what would do.
        UsageError: `out` holds something else, or a number of bits is unknown.
        WrongModelError: profile or buddy map belong to another model.
        DiskFullError: the bundle would not fit on the disk.
        CorruptArtifactError: an input is damaged.
    """
    start = time.perf_counter()
    skeleton_precision = parse_precision("--skeleton-bits", skeleton_bits)
    if isinstance(skeleton_precision, IntegerPrecision) and skeleton_precision.base is not None:
        raise UsageError(
            f"--skeleton-bits {skeleton_bits}: only experts are nested", hint="--skeleton-bits 4"
        )
    opened = open_model(model)
    shape = opened.shape
    measured = _read_profile(profile, opened.identity, shape)
    if plan is not None:
        require_plan_fits(
            plan, opened.identity, bits, skeleton_bits, replicas, has_heat=profile is not None
        )
    if sparse_experts:
        own = channel_forms(sparse_experts, bits, shape, quantizer)
    else:
        own = own_forms("--bits", bits, plan, shape, quantizer)
    if own.is_sparse and (replicas or plan is not None):
        raise UsageError(
            f"--sparse-experts {sparse_experts} beside --replicas or --plan: experts in channels "
            "have no other forms, and plans do not know them",
            hint="leave the others out",
        )
    stand_ins, buddies_sha = _read_buddies(buddies, opened.identity, shape)
    cheaper = _replicas(replicas, shape, measured, quantizer)
    if cheaper and (own.others or own.absent):
        raise UsageError(
            "--replicas beside experts of mixed bits: a bundle has one or the other",
            hint="leave --replicas out, or give one number of --bits",
        )
    planned = None if plan is None else planned_residents(plan, cheaper)
    if planned is not None:
        cheaper = tuple(form for form in cheaper if planned[form])
    if own.is_nested and measured.tokens is None:
        raise UsageError(
            f"--bits {bits}: the first bits are priced on a profile's tokens, and there is none",
            hint="--profile FILE, of moe-tool profile",
        )
    if own.is_nested and any(isinstance(each, IntegerPrecision) for each in cheaper):
        raise UsageError(
            f"--bits {bits} beside --replicas {replicas}: the first bits are the replica",
            hint="leave --replicas out, or name ranks only",
        )
    if own.is_sparse and measured.tokens is None:
        raise UsageError(
            f"--sparse-experts {sparse_experts}: thresholds are measured on a profile's tokens, "
            "and there is none",
            hint="--profile FILE, of moe-tool profile",
        )
    is_calibrated = bool(cheaper) or own.is_nested or own.is_sparse
    is_calibrated |= needs_inputs(quantizer) and own.has_codes
    if is_calibrated and measured.tokens is None:
        raise UsageError(
            f"--quantizer {quantizer} goes by what experts are given, and there is no profile",
            hint="--profile FILE, of moe-tool profile",
        )
    n_tokens = measured.tokens.ids.size if is_calibrated and measured.tokens is not None else 0
    memory = plan_pack_memory(
        opened, n_tokens=n_tokens, is_nested=own.is_nested, asked=memory_bytes
    )
    skeleton = SkeletonWork(opened, skeleton_precision)
    writer = BundleWriter.open(
        out,
        identity=opened.identity.model_copy(update={"full": measured.full_hash}),
        shape=shape,
        precision=own.precision,
        order=measured.order,
        replicas=cheaper,
        replicas_of=None if planned is None else [planned[form] for form in cheaper],
        others=own.others,
        absent=own.absent,
        made_from={
            "bits": bits,
            "skeleton_bits": skeleton_bits,
            "profile": measured.sha256 or "none",
            "buddies": buddies_sha,
            **({"replicas": ",".join(each.name for each in cheaper)} if cheaper else {}),
            **({"sparse_experts": sparse_experts} if sparse_experts else {}),
            **({"quantizer": quantizer} if quantizer != "rtn" else {}),
            **({} if plan is None else {"plan": sha256_of_plan(plan)}),
        },
    )
    with opened.checkpoint:
        resumed = writer.n_written
        unrouted: list[ExpertKey] = []
        if not writer.finished:
            require_free_disk(
                out.absolute().parent,
                sum(writer.forms[level].layout.size_bytes for level, _, _ in writer.to_write)
                + skeleton.size_bytes,
            )
            try:
                if is_calibrated:
                    assert measured.tokens is not None
                    unrouted = write_calibrated(
                        writer,
                        opened,
                        model.folder,
                        measured.tokens,
                        quantizer,
                        progress,
                        hidden_bytes=memory.hidden_bytes,
                    )
                else:
                    write_records(writer, opened, quantizer, progress)
            finally:
                writer.suspend()
            skeleton.write(writer, progress)
            for name, data in _companions(model.folder):
                writer.add_file(name, data)
        manifest = writer.finish(
            heat=measured.heat,
            buddies=stand_ins,
            prices=measured.prices,
            plan=plan,
            profile_sha256=measured.sha256,
        )
    expert_bytes = manifest.own_bytes
    return PackReport(
        bundle=out,
        bytes=sum(file.size_bytes for file in manifest.files),
        expert_bytes=expert_bytes,
        replica_bytes=sum(
            len(table.records) * table.record_size_bytes
            for table in manifest.replicas
            if not table.is_base
        ),
        skeleton_bytes=skeleton.size_bytes,
        skeleton_bits=skeleton_bits,
        bits_per_weight=8 * expert_bytes / (len(measured.order) * shape.n_expert_weights),
        error=_error(manifest),
        unrouted=tuple(unrouted),
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
        resumed_records=resumed,
    )


def _error(manifest: BundleManifest) -> float | None:
    """Mean over experts of their own forms' measured error."""
    if manifest.errors is None:
        return None
    return float(np.mean([entry.eps for entry in manifest.errors]))


def _replicas(
    text: str, shape: MoeShape, measured: _Measured, quantizer: Quantizer
) -> tuple[ReplicaPrecision, ...]:
    try:
        found = replica_precisions(text)
    except ValueError:
        raise UsageError(
            f"--replicas {text} is not known",
            hint="name widths of 8, 4, 3, 2 or 1 bits, and ranks: --replicas 3,2:128,rank16",
        ) from None
    if found and measured.tokens is None:
        raise UsageError(
            "--replicas are fitted to a profile's tokens and priced on them, and there is none",
            hint="--profile FILE, of moe-tool profile",
        )
    too_wide = [f.rank for f in found if not isinstance(f, IntegerPrecision)]
    if too_wide and max(too_wide) > shape.hidden:
        raise UsageError(
            f"--replicas rank{max(too_wide)}: the model is {shape.hidden} wide",
            hint="a rank that saves something is a small part of the width",
        )
    is_hqq = quantizer == "hqq"
    return tuple(
        each.model_copy(update={"zeros": is_hqq}) if isinstance(each, IntegerPrecision) else each
        for each in found
    )


def _read_profile(path: Path | None, identity: ModelIdentity, shape: MoeShape) -> _Measured:
    if path is None:
        order = [(layer, expert) for layer in shape.layers for expert in range(shape.experts)]
        return _Measured(
            sha256=None, heat=None, order=order, full_hash=None, prices=None, tokens=None
        )
    with ProfileReader.open(path) as profile:
        require_same_model(
            profile.header.identity,
            identity,
            artifact=f"the profile {path}",
            remedy=f"moe-tool profile {identity.name} --data builtin",
        )
        heat, order, prices = [], [], []
        for layer in shape.layers:
            statistics = profile.statistics(layer)
            prices.append(layer_prices(layer, statistics, profile.trace(layer)))
            counts = statistics.in_sample
            share = np.minimum(counts.load / max(counts.n_tokens, 1), 1.0)
            heat.append(LayerHeat(layer=layer, load=tuple(float(x) for x in share)))
            order += [(layer, e) for e in order_experts(counts.load, counts.coactivation)]
        return _Measured(
            sha256=profile.sha256,
            heat=tuple(heat),
            order=order,
            full_hash=profile.header.identity.full,
            prices=tuple(prices),
            tokens=profile.tokens,
        )


def _read_buddies(
    path: Path | None, identity: ModelIdentity, shape: MoeShape
) -> tuple[BundleBuddies | None, str]:
    if path is None:
        return None, "none"
    found = read_json_artifact(path, BuddyMap)
    require_same_model(
        found.identity,
        identity,
        artifact=f"the buddy map {path}",
        remedy=f"moe-tool buddies on a profile of {identity.name}",
    )
    fits = [entry.layer for entry in found.layers] == list(shape.layers) and all(
        len(entry.buddies) == shape.experts for entry in found.layers
    )
    if not fits:
        raise CorruptArtifactError(
            f"the buddy map {path} does not fit the model's "
            f"{len(shape.layers)} layers of {shape.experts} experts",
            hint="make it again with moe-tool buddies",
        )
    return BundleBuddies(
        by=found.by, layers=found.layers
    ), f"{found.by}-{found.k}-{found.profile_sha256}"


def _companions(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in _COMPANION_FILES:
        path = folder / name
        if path.is_file() and path.stat().st_size <= _COMPANION_MAX_BYTES:
            yield name, path.read_bytes()
