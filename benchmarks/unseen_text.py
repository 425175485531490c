"""Policies on texts that the profile saw and did not see, each text by itself.

    python benchmarks/unseen_text.py BUNDLE --text NAME=FILE [--text ...]
        [--memory 50%,25%] [--policy priced:kl=0.01 ...] [--residency cache] [--tokens 2048]
        [--seq-len 256] [--shadow N] [--out rows.jsonl]

Every sequence begins with an empty cache, of which the first reads are counted too. The columns
are KL(exact || policy) with its 95 % interval, the largest mean of a sequence, what the account
expected, and bytes read per token, measured tokens included.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from result_rows import RowFile, print_table, record_rows

from moe_tool.budget.request import parse_memory
from moe_tool.budget.sizes import format_bytes
from moe_tool.evaluation.figures import summarize
from moe_tool.evaluation.measure_policies import measure_policies
from moe_tool.policies.eviction import parse_eviction
from moe_tool.policies.misses import EXACT_POLICY, parse_miss_policy
from moe_tool.progress import SILENT
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources

HEADINGS = ("in memory", "text", "answers", "KL", "95 %", "worst", "expected", "read per token")
_POLICIES = ("exact", "near-tie", "replica", "priced:kl=0.01", "priced:kl=0.03")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--memory", default="50%,25%")
    parser.add_argument("--policy", action="append")
    parser.add_argument("--residency", choices=("cache", "frozen"), default="cache")
    parser.add_argument("--eviction", default="lfu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--shadow", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with record_rows(a.out, vars(a)) as kept:
        rows = [row for memory in a.memory.split(",") for row in _rows(a, memory, kept)]
    print_table(HEADINGS, rows)


def _rows(a: argparse.Namespace, memory: str, kept: RowFile) -> Iterator[list[str]]:
    options = RunOptions(
        memory=parse_memory(memory),
        policy=EXACT_POLICY,
        residency=a.residency,
        eviction=parse_eviction(a.eviction) if a.residency == "cache" else None,
        context=a.seq_len,
        prompt_tokens=a.seq_len,
        threads=a.threads,
        shadow=a.shadow,
    )
    with open_session(a.bundle, options) as session:
        for text in a.text:
            for policy in a.policy or _POLICIES:
                yield _row(a, session, memory, text, policy, kept)


def _row(
    a: argparse.Namespace, session: Session, memory: str, text: str, policy: str, kept: RowFile
) -> list[str]:
    sequences = build_sequences(
        parse_sources([text]),
        session.tokenizer,
        vocabulary=session.manifest.shape.vocabulary,
        n_tokens=a.tokens,
        seq_len=a.seq_len,
        holdout=0.0,
        seed=0,
    )
    (measured,) = measure_policies(
        session,
        [parse_miss_policy(policy)],
        residency=a.residency,
        ids=torch.from_numpy(sequences.ids.astype("int64")),
        source=None,
        exact_fallback=True,
        progress=SILENT,
    ).values()
    figures = summarize(measured, sequences.domain >= 0, seed=0)
    kl, name, expected = figures.kl_mean, text.partition("=")[0], figures.expected_kl
    worst = float(measured.kl.mean(axis=1).max())
    kept.add(
        "answers",
        memory=memory,
        text=name,
        policy=policy,
        kl=kl.value,
        worst=worst,
        bytes_per_token=figures.bytes_read_per_token.value,
    )
    return [
        memory,
        name,
        policy,
        f"{kl.value:.4f}",
        f"{kl.low:.4f} to {kl.high:.4f}",
        f"{worst:.4f}",
        "" if expected is None else f"{expected:.4f}",
        format_bytes(figures.bytes_read_per_token.value),
    ]


if __name__ == "__main__":
    main()
