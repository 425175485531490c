"""Every table of docs/systems.md for one model, made anew: `make systems-tables`.

    python benchmarks/systems_tables.py MODEL --train [NAME=]SOURCE [--train ...]
        --judge [NAME=]SOURCE [--judge ...] [--work DIR] [--out FILE.md] [--only TABLE,...]

Profiles and packs MODEL in --work (default build/systems/NAME), then runs one benchmark after the
other; what is there already is kept, so that an interrupted run goes on. Residents, lists, prices
and thresholds come from --train alone, every figure from --judge. Speeds want a quiet machine.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_tool.formats.profile_hdf5 import ProfileReader

HERE = Path(__file__).parent
_PACK = ("--bits", "4", "--quantizer", "gptq", "--replicas", "3,2,rank16")
_LONGEST_LIST = 16
_PUBLISHED = ("--by", "coactivation", "--alpha", "0.9", "--scale", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One benchmark and the words of its command line."""

    name: str
    title: str
    words: tuple[str, ...]


def main() -> None:
    """Run the benchmarks that are missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", action="append", required=True)
    parser.add_argument("--judge", action="append", required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="names of tables")
    a = parser.parse_args()
    name = Path(a.model).name
    work = a.work or Path("build/systems") / name
    work.mkdir(parents=True, exist_ok=True)
    _prepare(a.model, a.train, work)
    tables = list(_tables(a.model, a.train, a.judge, work.resolve()))
    wanted = a.only.split(",") if a.only else [table.name for table in tables]
    for table in tables:
        if table.name in wanted:
            _run(table, work)
    page = a.out or work / "tables.md"
    page.write_text(_page(name, a, tables, work), encoding="utf-8")
    print(f"wrote {page}")


def _prepare(model: str, train: list[str], work: Path) -> None:
    """Make the profile, both buddy maps and both bundles, each unless it is there."""
    profile = work / "profile.h5"
    texts = [word for text in train for word in ("--data", text)]
    _tool(profile, "profile", model, *texts, "--tokens", "24576", "--seq-len", "256")
    with ProfileReader.open(profile) as reader:
        longest = min(_LONGEST_LIST, reader.header.shape.experts - 1)
    for kind, words in (("ours", ()), ("published", _PUBLISHED)):
        buddies = work / f"{kind}.buddies.json"
        _tool(buddies, "buddies", str(profile), "--k", str(longest), *words)
        made_of = ("--profile", str(profile), "--buddies", str(buddies))
        _tool(work / kind, "pack", model, *made_of, *_PACK)


def _tool(out: Path, *words: str) -> None:
    if not out.exists():
        subprocess.run([sys.executable, "-m", "moe_tool", *words, "--out", str(out)], check=True)


def _tables(model: str, train: list[str], judge: list[str], work: Path) -> Iterator[Table]:
    ours, published, profile = (str(work / name) for name in ("ours", "published", "profile.h5"))
    texts = tuple(word for text in judge for word in ("--text", text))
    buddies = (ours, published, *texts)
    yield Table(
        name="buddy_quality",
        title="BuddyMoE: what answers cost",
        words=("buddy_table.py", *buddies, "--only", "quality"),
    )
    yield Table(
        name="buddy_speed",
        title="BuddyMoE: tokens per second on a slow disk",
        words=("buddy_table.py", *buddies, "--only", "speed"),
    )
    yield Table(
        name="replica",
        title="HOBBIT's `replica` and `priced` on equal terms",
        words=("replica_versus_priced.py", ours, *texts),
    )
    yield Table(
        name="penalty", title="HOBBIT: penalty of misses", words=("hobbit_penalty.py", profile)
    )
    yield Table(
        name="near_tie",
        title="SMoE: the width of the bands",
        words=("near_tie_curve.py", ours, *texts, "--ratios", "0.5,0.25"),
    )
    yield Table(
        name="precision",
        title="SMoE: what is foretold of the next layer",
        words=("prefetch_precision.py", ours, "--text", judge[0]),
    )
    yield Table(
        name="stall",
        title="HOBBIT: waiting for reads, by prefetch",
        words=("prefetch_stall.py", ours, "--text", judge[0]),
    )
    yield Table(
        name="bits",
        title="MC: ways to hand out bits",
        words=("bit_allocation.py", model, profile, "--text", judge[0]),
    )
    yield Table(
        name="pruning",
        title="MC#: trained mask routers",
        words=("learned_pruning.py", ours, "--train", *train, "--judge", *judge),
    )
    chosen = ("--select", judge[0], "--judge", *(judge[1:] or judge))
    yield Table(
        name="eco",
        title="ECO: codes trained without a master copy",
        words=("eco_versus_master.py", model, "--train", *train, *chosen, "--steps", "500"),
    )


def _run(table: Table, work: Path) -> None:
    """Run a benchmark unless its table is there."""
    out = work / f"{table.name}.md"
    if out.exists():
        return
    print(f"{table.title} ...", flush=True)
    script, *words = table.words
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"{script} failed")
    out.write_text(done.stdout, encoding="utf-8")


def _page(name: str, a: argparse.Namespace, tables: list[Table], work: Path) -> str:
    parts = [
        f"# Tables of docs/systems.md: {name}\n",
        f"Profile of {', '.join(_names(a.train))}; figures of {', '.join(_names(a.judge))}. "
        "Experts at 4 bits by GPTQ, replicas of 3 and 2 bits and rank 16.\n",
    ]
    for table in tables:
        found = work / f"{table.name}.md"
        if found.exists():
            parts.append(f"## {table.title}\n\n{found.read_text(encoding='utf-8').strip()}\n")
    return "\n".join(parts)


def _names(texts: list[str]) -> list[str]:
    return [text.partition("=")[0] for text in texts]


if __name__ == "__main__":
    main()
