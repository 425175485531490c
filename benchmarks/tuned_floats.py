"""Norms and routers trained behind tuned codes: KL from the checkpoint, on text that neither
trained nor chose.

    python benchmarks/tuned_floats.py MODEL ROUNDED TUNED --train news=FILE --judge reviews=FILE
        [--steps 100] [--rate 0.001] [--tokens 32768] [--judge-tokens 4096] [--out rows.jsonl]

ROUNDED is a bundle of MODEL and TUNED what `tune weights` made of it, without norms and routers.
Both kinds are trained together, as `tune weights --norms --router` does it, an eighth of `--train`
held out; rows name the parts of that training that are put into the codes' bundle. `kept` is the
mixture that the verb would keep. Intervals of 95 % are over sequences, ratios paired with the codes
alone.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from result_rows import print_table, record_rows

from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.evaluation.figures import means
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.layer_stream import LayerStream
from moe_tool.models.locate import LocatedModel, locate_model
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import parse_sources
from moe_tool.tuning.float_weights import Values, find_floats
from moe_tool.tuning.judge_floats import judge_floats
from moe_tool.tuning.streamed_bundle import StreamedBundle, Weights
from moe_tool.tuning.train_floats import FloatPlan, FloatTraining

_BATCH = 8
"""Sequences per forward of what is measured"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rounded", type=Path)
    parser.add_argument("tuned", type=Path)
    for name in ("train", "judge"):
        parser.add_argument(f"--{name}", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--judge-tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    located = locate_model(a.model, offline=True)
    opened = open_model(located)
    train, judge = (_text(located, opened, a, name) for name in ("train", "judge"))
    with opened.checkpoint, torch.no_grad(), record_rows(a.out, vars(a)) as kept:
        stream = LayerStream(located.folder, opened.checkpoint)
        floats = find_floats(stream, norms=True, router=True)
        texts = torch.split(torch.from_numpy(judge.ids.astype(np.int64)), _BATCH)
        rows: dict[str, np.ndarray] = {}
        with BundleReader.open(a.rounded) as reader:
            bundle = StreamedBundle(stream, floats, lambda layer: _experts(reader, layer))
            rows["rounded"] = _measure(bundle, texts, {"": floats.start})[""]
        with BundleReader.open(a.tuned) as reader:
            bundle = StreamedBundle(stream, floats, lambda layer: _experts(reader, layer))
            trained, verdict = _train(bundle, train, a)
            ways: dict[str, Values] = {"codes alone": floats.start}
            for share in (0.5, 1.0):
                for kinds in (("norms",), ("router",), ("norms", "router")):
                    name = f"{share:g} of {' and '.join(kinds)}"
                    ways[name] = floats.blended(trained, dict.fromkeys(kinds, share))
            ways[f"kept: {dict(verdict.shares)}"] = verdict.values
            rows |= _measure(bundle, texts, ways)
        lines = []
        for name, kl in rows.items():
            found = _line(name, kl, rows["codes alone"])
            kept.add("judged", **found)
            lines.append([str(each) for each in found.values()])
        kept.add(
            "held out",
            change=verdict.change_ci95,
            codes=verdict.codes_alone.kl,
            best=verdict.best.kl,
            rerouted=dict(verdict.rerouted),
        )
    print_table(("what", "KL", "interval", "to codes alone", "interval"), lines)
    print("held out:", verdict.codes_alone.kl, verdict.best.kl, verdict.change_ci95)
    print("rerouted:", {layer: round(share, 4) for layer, share in verdict.rerouted.items()})


def _text(
    located: LocatedModel, opened: OpenedModel, a: argparse.Namespace, name: str
) -> TokenSequences:
    is_train = name == "train"
    return build_sequences(
        parse_sources(getattr(a, name)),
        load_tokenizer(located.folder),
        vocabulary=opened.shape.vocabulary,
        n_tokens=a.tokens if is_train else a.judge_tokens,
        seq_len=a.seq_len,
        holdout=0.125 if is_train else 0.0,
        seed=0,
        offline=True,
    )


def _experts(reader: BundleReader, layer: int) -> Weights:
    found = {}
    for expert in np.flatnonzero(reader.manifest.stored(layer)).tolist():
        held = reader.primary_form(layer, expert)
        record = torch.empty(held.record_size_bytes, dtype=torch.uint8)
        reader.read_record_into(layer, expert, record, form=held.index)
        found[expert] = held.form.decode(record)
    return found


def _train(bundle: StreamedBundle, text: TokenSequences, a: argparse.Namespace):
    ids, held_out = torch.from_numpy(text.ids.astype(np.int64)), torch.from_numpy(text.held_out)
    plan = FloatPlan(
        ids=ids[~held_out],
        n_steps=a.steps,
        at_once=max(1, a.batch // a.seq_len),
        rate=a.rate,
        seed=0,
    )
    training = FloatTraining(bundle.floats, plan)
    exact = torch.cat(bundle.exact_states(torch.split(plan.ids, _BATCH)))
    for step in range(a.steps):
        loss = training.advance(bundle, exact)
        if step % 10 == 0:
            print(f"step {step}: KL {loss:.4f}", flush=True)
    verdict = judge_floats(bundle, training.values, ids[held_out], micro_batch=_BATCH, seed=0)
    return training.values, verdict


def _measure(
    bundle: StreamedBundle, batches: tuple[torch.Tensor, ...], ways: dict[str, Values]
) -> dict[str, np.ndarray]:
    """Return the mean KL of every sequence, [N] nats, by name."""
    exact = bundle.exact_states(batches)
    states = bundle.states(batches, list(ways.values()))
    found = {}
    for (name, values), own in zip(ways.items(), states, strict=True):
        parts = [bundle.divergence(*pair, values) for pair in zip(exact, own, strict=True)]
        found[name] = torch.cat(parts).double().mean(dim=1).numpy()
    return found


def _line(name: str, kl: np.ndarray, codes: np.ndarray) -> dict[str, object]:
    both = np.stack([kl, codes], axis=1)  # [N, 2]

    def ratio(drawn: np.ndarray) -> np.ndarray:
        found: np.ndarray = drawn[:, :, 0].mean(axis=1) / drawn[:, :, 1].mean(axis=1)
        return found

    own = bootstrap_interval(kl, means, seed=0) or (np.nan, np.nan)
    to_codes = bootstrap_interval(both, ratio, seed=0) or (np.nan, np.nan)
    return {
        "what": name,
        "kl": f"{kl.mean():.5f}",
        "interval": f"{own[0]:.5f}-{own[1]:.5f}",
        "to codes alone": f"{kl.mean() / codes.mean():.4f}",
        "its interval": f"{to_codes[0]:.4f}-{to_codes[1]:.4f}",
    }


if __name__ == "__main__":
    main()
