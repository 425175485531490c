"""`replica` (HOBBIT) and `priced` on equal terms: the same residents, as many settings each.

    python benchmarks/replica_versus_priced.py BUNDLE --text NAME=FILE [--text ...]
        [--memory 50%,25%] [--tokens 2048] [--seq-len 256] [--out rows.jsonl]

Both policies answer misses twice: with the residents that `priced` chooses and with those that
`replica` does (the hottest in full, a fifth of the bytes for cheaper forms). Each has six settings,
from few reads to many. The last column names the settings of the other policy, at the same
residents, that have both a lower KL and fewer bytes per token, intervals apart.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from result_rows import RowFile, print_table, record_rows

from moe_tool.artifacts.evaluation_report import Figures
from moe_tool.budget.request import parse_memory
from moe_tool.budget.sizes import format_bytes
from moe_tool.evaluation.equal_bytes import priced_settings
from moe_tool.evaluation.figures import summarize
from moe_tool.evaluation.measure_policies import measure_policies
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.policies.misses import EXACT_POLICY, PRICED_POLICY, MissChoice, parse_miss_policy
from moe_tool.progress import SILENT
from moe_tool.runtime.open_stores import open_stores
from moe_tool.runtime.plan_run import with_policy
from moe_tool.runtime.price_list import price_book
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import parse_sources

HEADINGS = ("in memory", "residents of", "answers", "KL", "95 %", "read per token", "dominated by")
_REPLICA = (
    "0.2,low=0.5",
    "0.33,low=0.5",
    "0.5,low=0.4",
    "0.67,low=0.3",
    "0.8,low=0.2",
    "0.9,low=0.1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting of one policy."""

    memory: str
    residents: str
    choice: MissChoice
    figures: Figures

    def dominates(self, other: "Row") -> bool:
        """Return whether this reads fewer bytes at a lower KL, intervals apart."""
        mine, theirs = self.figures, other.figures
        return (
            mine.kl_mean.high < theirs.kl_mean.low
            and mine.bytes_read_per_token.high < theirs.bytes_read_per_token.low
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--memory", default="50%,25%")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with record_rows(a.out, vars(a)) as kept:
        rows = [row for memory in a.memory.split(",") for row in _rows(a, memory, kept)]
    print_table(HEADINGS, [_cells(row, rows) for row in rows])


def _rows(a: argparse.Namespace, memory: str, kept: RowFile) -> Iterator[Row]:
    with BundleReader.open(a.bundle) as bundle:
        priced = (PRICED_POLICY, *priced_settings(price_book(bundle.manifest)))
    replica = tuple(parse_miss_policy(f"replica:high={setting}") for setting in _REPLICA)
    options = RunOptions(
        memory=parse_memory(memory),
        policy=EXACT_POLICY,
        residency="frozen",
        context=a.seq_len,
        prompt_tokens=a.seq_len,
        batch=32,
        threads=a.threads,
    )
    # Finite settings of `priced` may read cheaper forms, so that there is a slot for each.
    for holder in (priced[2], replica[3]):
        with open_session(a.bundle, options) as session:
            text = _text(a, session)
            _hold(session, holder)
            measured = measure_policies(
                session,
                [*priced, *replica],
                residency="frozen",
                ids=torch.from_numpy(text.ids.astype("int64")),
                source=None,
                exact_fallback=False,
                progress=SILENT,
            )
        for choice, found in measured.items():
            figures = summarize(found, text.domain >= 0, seed=0)
            row = Row(memory=memory, residents=holder.spec.name, choice=choice, figures=figures)
            kept.add(
                "answers",
                memory=memory,
                residents=row.residents,
                policy=choice.name,
                kl=figures.kl_mean.value,
                bytes_per_token=figures.bytes_read_per_token.value,
            )
            yield row


def _text(a: argparse.Namespace, session: Session) -> TokenSequences:
    return build_sequences(
        parse_sources(a.text),
        session.tokenizer,
        vocabulary=session.manifest.shape.vocabulary,
        n_tokens=a.tokens,
        seq_len=a.seq_len,
        holdout=0.0,
        seed=0,
    )


def _hold(session: Session, holder: MissChoice) -> None:
    """Keep the residents of one policy, whichever answers, and a slot to read every form into."""
    plan = with_policy(session.plan, holder, "frozen", session.manifest, session.skeleton)
    rooms = tuple(replace(room, n_slots=max(1, room.n_slots)) for room in plan.rooms)
    session.make_store = lambda bundle, _, eviction: open_stores(bundle, rooms, eviction)
    session.empty_cache()


def _cells(row: Row, rows: list[Row]) -> list[str]:
    figures = row.figures
    better = [
        other.choice.name
        for other in rows
        if (other.memory, other.residents) == (row.memory, row.residents)
        and other.choice.spec != row.choice.spec
        and other.dominates(row)
    ]
    kl = figures.kl_mean
    return [
        row.memory,
        row.residents,
        row.choice.name,
        f"{kl.value:.4f}",
        f"{kl.low:.4f} to {kl.high:.4f}",
        format_bytes(figures.bytes_read_per_token.value),
        ", ".join(better) or "none",
    ]


if __name__ == "__main__":
    main()
