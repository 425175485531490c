"""Costs of one model on one machine: bytes of a record, seconds of a layer call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from moe_tool.artifacts.expert_ids import LayerIds
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.moe_shape import FLOAT_SIZE_BYTES, MoeShape
from moe_tool.artifacts.pack_plan import Bits, SkeletonBits
from moe_tool.artifacts.precision import (
    NATIVE_WIDTH,
    WholeExpertPrecision,
    precision_from_bits,
    stored_as,
)
from moe_tool.artifacts.skeleton_facts import SkeletonFacts
from moe_tool.budget.slots import min_slots
from moe_tool.formats.profile_hdf5 import ProfileHeader
from moe_tool.formats.record_form import record_form
from moe_tool.simulator.simulate import Machine
from moe_tool.simulator.time_model import CallCosts

_ASLEEP_S = 0.003
"""Time after which waiting cores sleep"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Costs at one precision."""

    record_bytes: int
    matrix_bytes: int
    """Bytes of the skeleton that a forward reads; 0 if the profile does not say"""
    calls: CallCosts


def record_precision(header: ProfileHeader, bits: Bits) -> WholeExpertPrecision:
    """Return the precision of an expert in a bundle of `pack --bits`."""
    return stored_as(precision_from_bits(bits), header.kept)


def record_size(header: ProfileHeader, bits: Bits) -> int:
    """Return the bytes of an expert's record in a bundle of `pack --bits`."""
    return record_form(header.shape, record_precision(header, bits)).layout.size_bytes


def native_bits(header: ProfileHeader) -> Fraction:
    """Return the bits of a weight in a native record: those of kept codes with their scales, or
    NATIVE_WIDTH for floats of any dtype."""
    if header.kept is None:
        return Fraction(NATIVE_WIDTH)
    tensors = header.shape.expert_tensors
    vectors = {each.name for each in tensors if len(each.shape) != 2}
    segments = record_form(header.shape, header.kept).layout.segments
    n_bytes = sum(each.n_bytes for each in segments if each.name not in vectors)
    n_weights = sum(math.prod(each.shape) for each in tensors if each.name not in vectors)
    return Fraction(8 * n_bytes, n_weights)


def useful_widths(header: ProfileHeader, widths: Sequence[int]) -> tuple[int, ...]:
    """Return the widths without those that rounding kept codes again would make no smaller."""
    kept = header.kept
    return tuple(
        width
        for width in widths
        if width == NATIVE_WIDTH or kept is None or width < kept.width_bits
    )


def timed_as(precision: WholeExpertPrecision) -> str:
    """Return the width whose measured products take as long."""
    return str(precision.width_bits) if precision.kind == "kept" else precision.name


def model_costs(
    header: ProfileHeader,
    hardware: HardwareProfile,
    *,
    bits: Bits,
    skeleton_bits: SkeletonBits,
    threads: int | None = None,
) -> ModelCosts:
    """Return the costs of a layer call with one token, without matrices that the profile lacks.

    Args:
        threads: threads of computation; None: all cores.
    """
    shape, skeleton = header.shape, header.skeleton
    return costs_of_bytes(
        shape,
        hardware,
        record_bytes=record_size(header, bits),
        matrix_bytes=_matrix_bytes(shape, skeleton, skeleton_bits),
        n_matrices=0 if skeleton is None else sum(each.count for each in skeleton.linears),
        bits=timed_as(record_precision(header, bits)),
        skeleton_bits=skeleton_bits,
        threads=threads,
    )


def replay_machine(
    shape: MoeShape, costs: ModelCosts, ranked: Sequence[tuple[int, int]]
) -> Machine:
    """Return the replay's description of a model on a machine.

    Args:
        ranked: (layer, expert) that a policy may pin, the most used first.
    """
    ids = LayerIds(shape.layers, shape.experts)
    return Machine(
        record_bytes=costs.record_bytes,
        n_slots_min=min_slots(shape.top_k, shape.experts * len(shape.layers)),
        costs=costs.calls,
        hottest=[ids.number(key) for key in ranked],
    )


def costs_of_bytes(
    shape: MoeShape,
    hardware: HardwareProfile,
    *,
    record_bytes: int,
    matrix_bytes: int,
    n_matrices: int,
    bits: str,
    skeleton_bits: str,
    threads: int | None = None,
) -> ModelCosts:
    """Return the costs of a layer call for given sizes; see `model_costs`."""
    n_threads = threads or hardware.cores
    touched = shape.top_k * record_bytes + matrix_bytes // shape.n_decoder_layers
    # An expert is two products: two skeleton matrices take as long as an expert of their size.
    n_calls = n_matrices / 2
    matrix_s = 0.0
    if n_matrices:
        matrix_s = n_calls * hardware.expert_seconds(
            skeleton_bits, matrix_bytes / n_calls, 1, n_threads
        )
    n_other_layers = shape.n_decoder_layers - len(shape.layers)
    layer_s = hardware.layer_seconds(touched)
    return ModelCosts(
        record_bytes=record_bytes,
        matrix_bytes=matrix_bytes,
        calls=CallCosts(
            forward_s=matrix_s + n_other_layers * layer_s,
            layer_s=layer_s,
            expert_s=hardware.expert_seconds(bits, record_bytes, 1, n_threads),
            read_one_s=record_bytes / hardware.disk_bytes_per_s(record_bytes, 1),
            read_s=record_bytes / hardware.disk_bytes_per_s(record_bytes, 2),
            waking_s=hardware.waking_s,
            wait_s=_ASLEEP_S,
        ),
    )


def _matrix_bytes(shape: MoeShape, skeleton: SkeletonFacts | None, bits: SkeletonBits) -> int:
    """Return the bytes of matrices and head; the one row read of an embedding is not counted."""
    if skeleton is None:
        return 0
    if bits == "native":
        return (
            skeleton.linear_native_bytes
            + skeleton.tied_head_weights * FLOAT_SIZE_BYTES[shape.dtype]
        )
    return skeleton.stored_bytes(bits) - skeleton.native_bytes + skeleton.linear_native_bytes
