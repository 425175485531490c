"""Datasets that a profile must have, with shapes and dtypes."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from moe_tool.artifacts.expert_statistics import PRICED_WIDTHS, ProbeStatistics
from moe_tool.artifacts.moe_shape import MoeShape


@dataclass(frozen=True, slots=True)
class Expected:
    """Expected shape and dtype of one dataset."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Kind and bytes as in numpy, e.g. "u2"; a kind alone allows any width"""
    is_optional: bool = False


def expected_datasets(
    shape: MoeShape, *, n_sequences: int, seq_len: int, n_domains: int
) -> Iterator[Expected]:
    """Yield every dataset of a profile."""
    tokens, n_tokens = (n_sequences, seq_len), n_sequences * seq_len
    yield Expected("tokens/ids", tokens, "i4")
    yield Expected("tokens/domain", (n_sequences,), "i2")
    yield Expected("tokens/document", tokens, "i4")
    yield Expected("tokens/held_out", (n_sequences,), "b1")
    for position, layer in enumerate(shape.layers):
        depth = min(3, len(shape.layers) - 1 - position)
        chosen, scored = (n_tokens, shape.top_k), (n_tokens, shape.experts)
        yield Expected(f"layers/{layer}/top_k_index", chosen, "u2")
        yield Expected(f"layers/{layer}/top_k_weight", chosen, "f2")
        yield Expected(f"layers/{layer}/router_logits", scored, "f2")
        yield Expected(f"layers/{layer}/selection_score", scored, "f2", is_optional=True)
        yield Expected(f"layers/{layer}/next_gate_index", (depth, *chosen), "u2")
        yield from _statistics(f"layers/{layer}/stats", shape.experts, n_domains)


def _statistics(base: str, e: int, n_domains: int) -> Iterator[Expected]:
    yield Expected(f"{base}/eps_buddy_transferred", (e, e), "f")
    yield Expected(f"{base}/eps_bits", (e, len(PRICED_WIDTHS)), "f")
    yield Expected(f"{base}/eps_bits_n_tokens", (e,), "i")
    yield Expected(f"{base}/router_similarity", (e, e), "f")
    yield Expected(f"{base}/sensitivity", (), "f")
    yield Expected(f"{base}/sensitivity_n_tokens", (), "i")
    for part in ("in_sample", "held_out"):
        yield Expected(f"{base}/{part}/n_tokens", (), "i")
        yield Expected(f"{base}/{part}/load", (e,), "i")
        yield Expected(f"{base}/{part}/gate_sum", (e,), "f")
        yield Expected(f"{base}/{part}/coactivation", (e, e), "i")
        yield Expected(f"{base}/{part}/domain_load", (n_domains, e), "i")
        yield Expected(f"{base}/{part}/same_as_previous", (), "f")
    kinds = {"n_routed": "i", "fell_back": "b"}
    vectors = {*kinds, "output_norm", "output_ratio", "eps_drop"}
    for part in ("probe", "probe_held_out"):
        for field in fields(ProbeStatistics):
            name = f"{base}/{part}/{field.name}"
            if field.type in (int, "int"):
                yield Expected(name, (), "i")
            else:
                rank = 1 if field.name in vectors else 2
                yield Expected(name, (e,) * rank, kinds.get(field.name, "f"))
