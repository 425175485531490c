"""How long `simulate` and `plan` take on the profile of a large model.

    python benchmarks/simulate_speed.py [--tokens 65536] [--layers 32] [--experts 128] [--top-k 8]
        [--work DIR]

A synthetic profile is written: skewed routers whose choices stick from token to token, a quarter of
the sequences held out. Then the default table of `simulate` and one plan are timed, one process
each, on one core.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from child_runs import run_program

from moe_tool.artifacts.expert_statistics import ExpertStatistics, ProbeStatistics, RoutingCounts
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.artifacts.skeleton_facts import LinearCount, SkeletonFacts
from moe_tool.formats.profile_hdf5 import ProfileHeader, write_layer_part, write_profile

_SEQ_LEN = 512
_HIDDEN, _INNER = 2048, 768


def write_synthetic(path: Path, a: argparse.Namespace) -> None:
    """Write the profile, layer by layer."""
    rng = np.random.default_rng(0)
    n_sequences = a.tokens // _SEQ_LEN
    held_out = np.arange(n_sequences) % 4 == 3

    parts = {}
    shape = _shape(a)
    choices = [_choices(rng, a) for _ in range(a.layers)]
    for layer in range(a.layers):
        parts[layer] = path.with_name(f"{path.name}.{layer}.part")
        following = choices[layer + 1 : layer + 4]
        noise = rng.random((len(following), a.tokens, a.top_k)) < 0.3
        guesses = np.stack([each for each, _ in following]) if following else None
        if guesses is None:
            guesses = np.empty((0, a.tokens, a.top_k), np.uint16)
        guesses = np.where(noise, rng.integers(0, a.experts, guesses.shape), guesses)
        index, logits = choices[layer]
        trace = LayerTrace(
            top_k_index=index,
            top_k_weight=np.full(index.shape, 1 / a.top_k, np.float16),
            router_logits=logits,
            selection_score=None,
            next_gate_index=guesses.astype(np.uint16),
        )
        write_layer_part(parts[layer], layer, trace, _statistics(index, held_out, a))

    header = ProfileHeader(
        identity=ModelIdentity(name="synthetic", model_type="qwen3_moe", quick="1" * 64),
        shape=shape,
        tokenizer_sha256="2" * 64,
        sources=("synthetic",),
        seed=0,
        seq_len=_SEQ_LEN,
        holdout=0.25,
        tool_version="0",
        skeleton=_skeleton(a),
    )
    tokens = TracedTokens(
        ids=np.zeros((n_sequences, _SEQ_LEN), np.int32),
        domain=np.zeros(n_sequences, np.int16),
        document=np.zeros((n_sequences, _SEQ_LEN), np.int32),
        held_out=held_out,
        domains=("synthetic",),
    )
    sensitivities = dict.fromkeys(range(a.layers), 0.01)
    write_profile(path, header, tokens, parts, sensitivities, sensitivity_n_tokens=1)
    for part in parts.values():
        part.unlink()


def _choices(rng: np.random.Generator, a: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts [T, K] and logits [T, E] of one layer."""
    popularity = rng.permutation(-0.8 * np.log(np.arange(1, a.experts + 1)))
    logits = popularity + rng.gumbel(size=(a.tokens, a.experts))
    sticky = np.zeros(a.experts)
    index = np.empty((a.tokens, a.top_k), np.uint16)
    for token in range(a.tokens):
        row = logits[token]
        row += sticky
        chosen = np.argpartition(-row, a.top_k)[: a.top_k]
        index[token] = chosen
        sticky *= 0.5
        sticky[chosen] = 1.0
    return index, logits.astype(np.float16)


def _statistics(index: np.ndarray, held_out: np.ndarray, a: argparse.Namespace) -> ExpertStatistics:
    rows = np.repeat(held_out, _SEQ_LEN)
    e = a.experts

    def counts(part: np.ndarray) -> RoutingCounts:
        load = np.bincount(part.ravel(), minlength=e).astype(np.int64)
        return RoutingCounts(
            n_tokens=len(part),
            load=load,
            gate_sum=load / a.top_k,
            coactivation=np.diag(load),
            domain_load=load[None],
            same_as_previous=0.5,
        )

    one, square = np.ones(e, np.float32), np.ones((e, e), np.float32)
    probe = ProbeStatistics(
        n_sampled=1, n_cka=1, n_routed=np.ones(e, np.int64), fell_back=np.zeros(e, bool),
        output_norm=one, output_ratio=one, cosine=square, cka=square, scale=square,
        eps_buddy=square, eps_drop=one,
    )  # fmt: skip
    return ExpertStatistics(
        in_sample=counts(index[~rows]),
        held_out=counts(index[rows]),
        probe=probe,
        probe_held_out=probe,
        eps_buddy_transferred=square,
        eps_bits=np.tile(np.array([0.004, 0.06, 0.15, 0.4, 0.9], np.float32), (e, 1)),
        eps_bits_n_tokens=np.ones(e, np.int64),
        router_similarity=square,
        sensitivity=0.01,
        sensitivity_n_tokens=1,
    )


def _shape(a: argparse.Namespace) -> MoeShape:
    return MoeShape(
        model_type="qwen3_moe",
        n_decoder_layers=a.layers,
        layers=tuple(range(a.layers)),
        experts=a.experts,
        top_k=a.top_k,
        hidden=_HIDDEN,
        vocabulary=32000,
        dtype="bfloat16",
        expert_tensors=(
            ExpertTensor(name="gate_up_proj", shape=(2 * _INNER, _HIDDEN)),
            ExpertTensor(name="down_proj", shape=(_HIDDEN, _INNER)),
        ),
    )


def _skeleton(a: argparse.Namespace) -> SkeletonFacts:
    linears = (LinearCount(n_outputs=_HIDDEN, n_inputs=_HIDDEN, count=4 * a.layers),)
    linear_bytes = 2 * sum(each.n_weights for each in linears)
    config = {
        "model_type": "qwen3_moe", "hidden_size": _HIDDEN, "num_hidden_layers": a.layers,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": a.experts, "num_experts_per_tok": a.top_k, "vocab_size": 32000,
        "moe_intermediate_size": _INNER, "intermediate_size": 4096,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    return SkeletonFacts(
        native_bytes=linear_bytes + 2 * 32000 * _HIDDEN,
        linear_native_bytes=linear_bytes,
        largest_tensor_bytes=2 * 32000 * _HIDDEN,
        linears=linears,
        tied_head_weights=0,
        config_json=json.dumps(config),
    )


def main() -> None:
    """Write, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tokens", 65536), ("layers", 32), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--work", type=Path, default=Path("build/simulate"))
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    path = a.work / f"synthetic-{a.layers}-{a.experts}-{a.top_k}-{a.tokens}.h5"
    if not path.exists():
        write_synthetic(path, a)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    core = ["taskset", "-c", "0", sys.executable, "-m", "moe_tool"]
    hardware = ["--hardware", "laptop-16gb", "--json"]
    found = {}
    for name, words in (
        ("simulate", ["simulate", path]),
        ("plan", ["plan", path, "--memory", "8GiB", "--out", a.work / "plan.json"]),
    ):
        start = time.perf_counter()
        command = [*core, *map(str, words), *hardware]
        outcome = run_program(command, environment=environment, timeout_s=900)
        if outcome.failure is not None:
            raise SystemExit(f"error: {name}: {outcome.failure}")
        found[f"{name}_s"] = round(time.perf_counter() - start, 1)
        found[f"{name}_peak_bytes"] = outcome.fields["peak_rss_bytes"]
        if name == "simulate":
            found["accesses_per_second"] = round(outcome.fields["accesses_per_second"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
