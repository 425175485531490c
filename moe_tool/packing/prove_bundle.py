"""Proof of a bundle: one short forward through the checkpoint, and the same through the bundle.

Both load the skeleton in the same way, one decoder layer at a time, and one expert at a time.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.budget.table_choice import AUTO_ROWS, RowsRequest
from moe_tool.errors import CorruptArtifactError
from moe_tool.experts.combine import run_experts
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.table_rows import TableRows
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.bundle_skeleton import bundle_loader, open_bundle_skeleton
from moe_tool.models.moe_layers import decoder_layers
from moe_tool.models.output_divergence import total_divergence
from moe_tool.models.skeleton import LayerCall
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.packing.pack_memory import PROOF_TOKENS
from moe_tool.quantization.channels import ChannelExpert
from moe_tool.quantization.weights import AnyWeight, FloatWeight

_ROUNDING = 1e-3
"""Relative difference of logits that products of the same numbers in another order may have: some
1e-7 each, which dozens of layers and a router's near tie enlarge; a wrong scale or row of codes
changes more"""
Rule = Literal["equal", "close", "bounded", "finite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleProof:
    """A bundle's predictions beside those of its checkpoint."""

    tokens: int
    rule: Rule
    """Requirement that was kept: equal logits; close ones, as products of the same weights are; a
    divergence below that of knowing nothing; or only finite logits"""
    difference: float
    """Norm of the difference of all logits, relative to the norm of the checkpoint's"""
    kl: float
    """Mean divergence of the bundle's predictions from the checkpoint's, nats per token"""
    most_kl: float
    """Divergence of knowing nothing, ln of the vocabulary: the bound on `kl` of a bounded one"""
    bytes_read: int
    """Bytes read of checkpoint and bundle"""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceForward:
    """One forward of a few tokens."""

    logits: torch.Tensor
    """Logits in float32, [T, V]"""
    states: list[torch.Tensor]
    """Hidden states after each decoder layer; empty if layers hand on something else"""


def forward_source(
    source: SkeletonLoader, opened: OpenedModel, *, rows: RowsRequest = AUTO_ROWS
) -> SourceForward:
    """Return the forward of a checkpoint that its bundle is compared with.

    Args:
        source: loader of the checkpoint's skeleton, not used before.
        opened: the checkpoint.
        rows: embedding tables of which only rows are read.

    Raises:
        CorruptArtifactError: it computes numbers that are not finite.
        StorageError: it cannot be read.
    """
    ids = _token_ids(opened.shape)
    on_disk = {
        name: TableRows.open_unhashed(source.tables[name].parts) for name in source.choose(rows)
    }
    try:
        return _forward(source, ids, lambda call: _by_source(opened, call), on_disk)
    except _NotFiniteError as error:
        raise CorruptArtifactError(
            f"{error.place} of {opened.identity.name} gives numbers that are not finite",
            hint="its weights are finite, so it overflows in float32: download the checkpoint "
            "again, or use another version of the model",
        ) from None
    finally:
        for table in on_disk.values():
            table.close()


def prove_bundle(
    source: SkeletonLoader,
    opened: OpenedModel,
    bundle: Path,
    *,
    wanted: SourceForward | None = None,
    rows: RowsRequest = AUTO_ROWS,
) -> BundleProof:
    """Compare a bundle's predictions with its checkpoint's.

    Args:
        source: loader of the checkpoint's skeleton, not used before.
        opened: the checkpoint.
        bundle: everything of the bundle, in the folder that it is written in.
        wanted: the checkpoint's forward; None: it is made.
        rows: embedding tables of which only rows are read.

    Raises:
        CorruptArtifactError: the bundle does not compute what the checkpoint does, or the
            checkpoint computes nothing finite.
        StorageError: one of them cannot be read.
    """
    start, before = time.perf_counter(), opened.checkpoint.bytes_read
    ids = _token_ids(opened.shape)
    wanted = wanted or forward_source(source, opened, rows=rows)
    with BundleReader.open(bundle, is_finished=False) as reader:
        rule = _rule(reader.manifest)
        stored = _StoredExperts(reader)
        with open_bundle_skeleton(reader) as skeleton:
            loader = bundle_loader(reader, skeleton)
            on_disk = {n: reader.tables.open(loader.tables[n].parts) for n in loader.choose(rows)}
            try:
                found = _forward(loader, ids, stored, on_disk)
            except _NotFiniteError as error:
                reason = f"{error.place} gives numbers that are not finite"
                raise _refused(bundle, rule, reason) from None
            read = opened.checkpoint.bytes_read - before + skeleton.bytes_read + stored.bytes_read
    difference, kl = _compare(wanted.logits, found.logits)
    _require(bundle, rule, wanted, found, difference=difference, kl=kl)
    return BundleProof(
        tokens=ids.numel(),
        rule=rule,
        difference=difference,
        kl=kl,
        most_kl=_most_kl(wanted),
        bytes_read=read,
        seconds=time.perf_counter() - start,
    )


def _token_ids(shape: MoeShape) -> torch.Tensor:
    """Return ids spread over the vocabulary, [1, T] int64: equal for every run."""
    steps = torch.arange(1, PROOF_TOKENS + 1)
    return (steps * shape.vocabulary // (PROOF_TOKENS + 1))[None]


def _rule(manifest: BundleManifest) -> Rule:
    """Return what a bundle of these precisions has to keep.

    Weights in the same floats go through the same products on both sides, so that every bit is
    equal. Kept codes stand for the same numbers, but are multiplied without being decoded first.
    Rounded weights cannot be held to a small number that is true of every model; but a model that
    knows nothing, for which all tokens are equally likely, is at most ln V away, and no rounding to
    2 bits or more should be worse. One bit, or removed experts, may be anything.
    """
    precisions = [table.precision for table in manifest.primaries]
    if manifest.removed or any(each.is_coded and not each.leaves_noise for each in precisions):
        return "finite"
    kinds = {each.kind for each in (*precisions, manifest.skeleton_precision)}
    if kinds == {"native"}:
        return "equal"
    return "close" if kinds <= {"native", "kept"} else "bounded"


def _require(
    bundle: Path,
    rule: Rule,
    wanted: SourceForward,
    found: SourceForward,
    *,
    difference: float,
    kl: float,
) -> None:
    """Refuse a bundle that breaks its rule."""
    most_kl = _most_kl(wanted)
    is_kept = {
        "equal": torch.equal(wanted.logits, found.logits),
        "close": difference <= _ROUNDING,
        "bounded": kl <= most_kl,
        "finite": True,
    }[rule]
    if is_kept:
        return
    if rule == "bounded":
        raise _refused(
            bundle, rule, f"{kl:.3g} nats per token away, where knowing nothing is {most_kl:.3g}"
        )
    limit = 0.0 if rule == "equal" else _ROUNDING
    pairs = zip(wanted.states, found.states, strict=True)
    parts = [f"layer {k}" for k, pair in enumerate(pairs) if _relative(*pair) > limit]
    raise _refused(
        bundle,
        rule,
        f"{parts[0] if parts else 'the head'} is the first that differs; of the logits "
        f"{difference:.2g} differs, where {limit:g} is allowed",
    )


def _most_kl(wanted: SourceForward) -> float:
    return math.log(wanted.logits.shape[-1])


def _refused(bundle: Path, rule: Rule, reason: str) -> CorruptArtifactError:
    again = f"remove {bundle} and run the command again"
    return CorruptArtifactError(
        f"the bundle does not compute what the checkpoint does: {reason}",
        hint=f"{again}; if that fails too, the memory or the disk may be at fault"
        if rule in ("equal", "close")
        else f"{again} with more bits",
    )


class _NotFiniteError(Exception):
    """A forward that overflows, with the part of the model that does first."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


@torch.no_grad()
def _forward(
    loader: SkeletonLoader,
    ids: torch.Tensor,
    answer: Callable[[LayerCall], torch.Tensor],
    on_disk: Mapping[str, TableRows],
) -> SourceForward:
    skeleton = loader.load_in_turn(on_disk)
    skeleton.set_experts_function(answer)
    states: list[torch.Tensor] = []

    def keep(layer: nn.Module, args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor):
            if not hidden.isfinite().all():
                raise _NotFiniteError(f"layer {len(states)}")
            states.append(hidden)

    for layer in decoder_layers(skeleton.model):
        layer.register_forward_hook(keep)
    logits: torch.Tensor = skeleton.model(input_ids=ids, use_cache=False).logits[0].float()
    if not math.isfinite(logits.amax().item()):  # amax propagates NaN; -inf is a mask
        raise _NotFiniteError("the head")
    return SourceForward(logits=logits, states=states)


def _by_source(opened: OpenedModel, call: LayerCall) -> torch.Tensor:
    def supply(wanted: list[int]) -> Iterator[tuple[int, Mapping[str, AnyWeight]]]:
        for expert in wanted:
            tensors = opened.experts.read(call.layer, expert)
            yield expert, {name: FloatWeight(values=value) for name, value in tensors.items()}

    return call.run_experts(supply)


class _StoredExperts:
    """Experts function over a bundle's primary records; slots of removed experts are dropped."""

    def __init__(self, bundle: BundleReader) -> None:
        self._bundle = bundle
        self.bytes_read = 0

    def __call__(self, call: LayerCall) -> torch.Tensor:
        index, present = call.find_present()
        is_stored = torch.from_numpy(self._bundle.manifest.stored(call.layer))[index]  # [T, K]
        present = is_stored if present is None else present & is_stored

        def supply(wanted: list[int]) -> Iterator[tuple[int, Mapping[str, AnyWeight]]]:
            for expert in wanted:
                yield expert, self._read(call.layer, expert)

        weight = torch.where(present, call.weight, 0)
        return run_experts(call.module, call.hidden, index, weight, supply, present=present)

    def _read(self, layer: int, expert: int) -> Mapping[str, AnyWeight]:
        held = self._bundle.primary_form(layer, expert)
        found: Mapping[str, AnyWeight] = self._decode(held.index, layer, expert)
        if isinstance(found, ChannelExpert):
            (selectors,) = (
                each.index
                for each in self._bundle.forms
                if each.table.role == "selector" and each.table.precision == held.table.precision
            )
            found.selector = self._decode(selectors, layer, expert)
        return found

    def _decode(self, form: int, layer: int, expert: int) -> Any:
        record = torch.empty(self._bundle.forms[form].record_size_bytes, dtype=torch.uint8)
        self._bundle.read_record_into(layer, expert, record, form=form)
        self.bytes_read += record.numel()
        return self._bundle.forms[form].form.decode(record)


def _compare(wanted: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Return relative difference and divergence per token, without tokens that the model masks."""
    kept = wanted.isfinite().all(dim=0)
    wanted, found = wanted[:, kept], found[:, kept]
    return _relative(wanted, found), total_divergence(wanted, found) / len(wanted)


def _relative(wanted: torch.Tensor, found: torch.Tensor) -> float:
    wanted = wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
