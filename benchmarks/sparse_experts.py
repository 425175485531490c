"""Experts of which some channels are left out, beside the whole ones and 4-bit records.

    python benchmarks/sparse_experts.py MODEL PROFILE --text FILE [--selectors gate2,up2]
        [--quantizer gptq] [--sparsity 0,0.5,0.7,0.8,0.9] [--tokens 2048] [--seq-len 256]
        [--memory 50%] [--folder DIR] [--out rows.jsonl]

Packs MODEL once for every selector, and once in records of 4 bits; then, for every sparsity,
decodes TEXT token by token with misses in the loop: KL(s = 0 || s), KL(checkpoint || s), the share
of channels that was left out (mean over the text, and how far the worst expert is from what was
asked for), what a miss read, and tokens per second, alternating with the 4-bit bundle. Recall is
that of masks made from the input of the layer before, and of the two choices together: of the
channels that a token needs of the experts that it is sent to, those that a mask from the layer
before names of the experts that its router would have named. Last, one expert of the size of
Mixtral's, out of a file in the page cache: how long the copy of the chosen channels and their
products take.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from result_rows import print_table, record_rows

from moe_tool.budget.request import parse_memory
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.experts.channel_forward import channel_sizes, choose_channels, selector_values
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.record_files import chunk_runs
from moe_tool.models.locate import locate_model
from moe_tool.models.skeleton import LayerCall
from moe_tool.native.channels import native_channels, read_runs
from moe_tool.native.kernels import Gate, set_threads
from moe_tool.packing.pack_bundle import pack_bundle
from moe_tool.packing.pack_options import parse_pack_options
from moe_tool.policies.eviction import Lru
from moe_tool.quantization.channels import ChannelWeight, row_bytes
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.store.channel_store import ChannelStore
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources

HEADINGS = (
    "selector",
    "sparsity",
    "left out",
    "worst expert",
    "KL to s=0",
    "KL to checkpoint",
    "bytes per miss",
    "of 4-bit record",
    "recall",
    "with router",
    "tokens/s",
)
SPEED_HEADINGS = ("sparsity", "copy ms", "products ms", "both, to whole")
N_SPEED_TOKENS = 128
OFTEN = 100
"""Tokens without which nothing is said of an expert"""


class MaskJudge:
    """Looks over a session's shoulder: what masks from the layer before would have been."""

    def __init__(self, session: Session, sparsity: float) -> None:
        self._session = session
        self._sparsity = sparsity
        self._selectors = ChannelStore(session.bundle, form=0, n_slots=1, eviction=Lru)
        layers = session.skeleton.layers
        self._before = {
            after.layer: at.layer for at, after in zip(layers, layers[1:], strict=False)
        }
        self._modules = {each.layer: each for each in layers}
        self._inputs: dict[int, torch.Tensor] = {}
        self.found = self.wanted = self.found_with_router = 0
        self.kept: dict[tuple[int, int], list[float]] = defaultdict(list)
        """By expert: the share of channels that each of its tokens needed"""

    def __call__(self, call: LayerCall) -> torch.Tensor:
        """Answer the call as the session does."""
        runner = self._session.runner
        if runner.forward.phase == "decode":
            self._judge(call)
        self._inputs[call.layer] = call.hidden.clone()
        return runner(call)

    def _judge(self, call: LayerCall) -> None:
        before = self._before.get(call.layer)
        guess = None if before is None else self._inputs[before]
        routed: set[int] = set()
        if guess is not None:
            routed = set(self._modules[call.layer].route(guess).index.flatten().tolist())
        for expert in call.index[0].tolist():
            selector = self._selectors.selector(call.layer, expert)
            own = choose_channels(call.module, selector, call.hidden, self._sparsity).index
            self.kept[call.layer, expert].append(len(own) / selector.weight.n_outputs)
            if guess is None:
                continue
            values = selector_values(call.module, selector, guess)
            sizes = channel_sizes(call.module, selector, values)[0]
            hits = int((sizes[own.long()] >= selector.threshold(self._sparsity)).sum())
            self.wanted += len(own)
            self.found += hits
            self.found_with_router += hits if expert in routed else 0

    @property
    def worst(self) -> float:
        """How far the expert that is farthest is from the sparsity asked for."""
        often = [shares for shares in self.kept.values() if len(shares) >= OFTEN]
        return max((abs(1 - float(np.mean(s)) - self._sparsity) for s in often), default=0.0)


@torch.inference_mode()
def decode(session: Session, ids: torch.Tensor) -> float:
    """Feed tokens one by one; return the seconds."""
    cache = session.new_cache()
    session.prompt_tokens = 1
    session.model(input_ids=ids[None, :1], past_key_values=cache)
    start = time.perf_counter()
    for at in range(1, len(ids)):
        session.model(input_ids=ids[None, at : at + 1], past_key_values=cache)
    session.prompt_tokens = None
    return time.perf_counter() - start


def judged(bundle: Path, sparsity: float, ids: np.ndarray, a: argparse.Namespace) -> MaskJudge:
    """Return what masks were and would have been on a text, [N, S]."""
    options = run_options(
        memory=a.memory, sparse_experts=sparsity, context=ids.shape[1], threads=a.threads
    )
    with open_session(bundle, options) as session:
        judge = MaskJudge(session, sparsity)
        session.skeleton.set_experts_function(judge)
        for row in ids:
            decode(session, torch.from_numpy(row.astype(np.int64)))
        return judge


def speeds(bundles: dict[float | None, Path], ids: np.ndarray, a: argparse.Namespace) -> dict:
    """Return tokens per second by sparsity, None for records of 4 bits; medians of runs in turn."""
    tokens = torch.from_numpy(ids[0].astype(np.int64))[:N_SPEED_TOKENS]
    found = defaultdict(list)
    sessions = {
        sparsity: open_session(
            bundle,
            run_options(
                memory=a.memory, sparse_experts=sparsity, context=len(tokens), threads=a.threads
            ),
        )
        for sparsity, bundle in bundles.items()
    }
    for turn in range(a.repetitions + 1):
        for sparsity, session in sessions.items():
            seconds = decode(session, tokens)
            if turn:
                found[sparsity].append((len(tokens) - 1) / seconds)
    for session in sessions.values():
        session.close()
    return {sparsity: float(np.median(rates)) for sparsity, rates in found.items()}


def large_expert(sparsities: list[float], a: argparse.Namespace) -> list[dict[str, float]]:
    """Time one expert with 14336 channels of width 4096: chosen channels copied, then computed."""
    n_channels, n_hidden = 14336, 4096
    chunk = 2 * row_bytes(n_hidden, 4, 64)
    draw = np.random.default_rng(0)
    set_threads(a.threads)
    record = torch.from_numpy(draw.integers(0, 60, (n_channels, chunk), dtype=np.uint8))
    weight = ChannelWeight(
        chunks=torch.empty_like(record).zero_(), width_bits=4, group=64, n_hidden=n_hidden
    )
    x, gate = torch.randn(1, n_hidden), Gate(activation="silu", gated=True)
    rows = []
    with tempfile.NamedTemporaryFile() as file:
        file.write(record.numpy().tobytes())
        file.flush()
        handle = os.open(file.name, os.O_RDONLY)
        for sparsity in sparsities:
            copies, products = [], []
            for _ in range(9):
                chosen = np.flatnonzero(draw.random(n_channels) >= sparsity)
                index = torch.from_numpy(chosen.astype(np.int32))
                start = time.perf_counter()
                starts, stops = chunk_runs(chosen, chunk)
                runs = np.stack([starts, stops - starts], axis=1) * chunk
                read_runs(handle, 0, runs, weight.chunks)
                copied = time.perf_counter()
                values = torch.randn(1, len(chosen))
                native_channels(weight, gate, x, values, index=index, is_gate=True, bias=None)
                copies.append(copied - start)
                products.append(time.perf_counter() - copied)
            rows.append(
                {
                    "sparsity": sparsity,
                    "copy ms": 1e3 * float(np.median(copies)),
                    "products ms": 1e3 * float(np.median(products)),
                }
            )
        os.close(handle)
    whole = rows[0]["copy ms"] + rows[0]["products ms"]
    for row in rows:
        row["both, to whole"] = (row["copy ms"] + row["products ms"]) / whole
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("profile", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--selectors", default="gate2,up2")
    parser.add_argument("--quantizer", default="gptq", choices=list(QUANTIZERS))
    parser.add_argument("--sparsity", default="0,0.5,0.7,0.8,0.9")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--memory", default="50%")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where bundles are kept")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    sparsities = [float(word) for word in a.sparsity.split(",")]
    with tempfile.TemporaryDirectory() as scratch, record_rows(a.out, vars(a)) as kept:
        folder = a.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for selector in a.selectors.split(","):
            for row in _compare(folder, selector, sparsities, a):
                kept.add("sparsity", **row)
                rows.append(row)
        print_table(HEADINGS, [[_cell(row[name]) for name in HEADINGS] for row in rows])
        print()
        large = large_expert(sparsities, a)
        for each in large:
            kept.add("large expert", **each)
        print_table(
            SPEED_HEADINGS, [[_cell(each[name]) for name in SPEED_HEADINGS] for each in large]
        )


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def _compare(
    folder: Path, selector: str, sparsities: list[float], a: argparse.Namespace
) -> Iterator[dict[str, str | float | None]]:
    model = locate_model(a.model, offline=True)
    bundle, plain = folder / f"{selector}-{a.quantizer}", folder / "rtn4"
    channels = parse_pack_options(out=bundle, sparse_experts=selector, quantizer=a.quantizer)
    pack_bundle(model, channels, profile=a.profile)
    pack_bundle(model, parse_pack_options(out=plain, bits="4"), profile=a.profile)
    sources = parse_sources([str(a.text)])
    with open_session(plain, run_options(memory=a.memory, context=64)) as session:
        tokenizer, record_4 = session.tokenizer, session.manifest.primaries[0].record_size_bytes
        vocabulary = session.manifest.shape.vocabulary
    text = build_sequences(
        sources,
        tokenizer,
        vocabulary=vocabulary,
        n_tokens=a.tokens,
        seq_len=a.seq_len,
        holdout=0.0,
        seed=0,
    )
    rates = speeds({None: plain, **dict.fromkeys(sparsities, bundle)}, text.ids, a)
    yield {name: None for name in HEADINGS} | {
        "selector": "4-bit records",
        "bytes per miss": record_4,
        "of 4-bit record": 1.0,
        "tokens/s": rates[None],
    }
    with BundleReader.open(bundle) as reader:
        record_bytes = reader.forms[0].record_size_bytes
    for sparsity in sparsities:
        report = evaluate(
            bundle,
            sources,
            EvaluateOptions(
                tokens=a.tokens,
                seq_len=a.seq_len,
                memory=parse_memory(a.memory),
                threads=a.threads,
                sparse_experts=sparsity,
            ),
            reference=model,
        )
        judge = judged(bundle, sparsity, text.ids, a)
        figures = report.figures
        misses = report.whole_bytes_per_token / record_bytes
        per_miss = figures.bytes_read_per_token.value / misses
        yield {
            "selector": selector,
            "sparsity": sparsity,
            "left out": report.sparsity,
            "worst expert": judge.worst,
            "KL to s=0": figures.kl_mean.value,
            "KL to checkpoint": figures.kl_source_mean.value,
            "bytes per miss": per_miss,
            "of 4-bit record": per_miss / record_4,
            "recall": judge.found / max(1, judge.wanted),
            "with router": judge.found_with_router / max(1, judge.wanted),
            "tokens/s": rates[sparsity],
        }


if __name__ == "__main__":
    main()
