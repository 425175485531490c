"""What a decoder layer costs beside its arithmetic, and an expert beside its kernel.

    python benchmarks/layer_overhead.py [--layers 16] [--tokens 64] [--rounds 7] [--depth 16]

A random Mixtral of width 64 is decoded one token at a time with experts that answer zeros at once:
matrices this small take microseconds, so that what is left is Python and transformers. Then one
layer's experts function is called with everything resident, and the kernel's own time taken off.
Each figure is the least of the rounds' medians, in CPU time of the one thread, which other work on
the machine disturbs less than wall time. A table on stderr, one JSON line on stdout.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.experts.gate import gate_of
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton import LayerCall
from moe_tool.native import kernels
from moe_tool.packing.pack_bundle import pack_bundle
from moe_tool.packing.pack_options import parse_pack_options
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.runtime.moe_layer import Forward
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session

Weight = FloatWeight | IntegerWeight

_RUNS_TOGETHER = 10
_HIDDEN, _INNER, _N_EXPERTS, _VOCABULARY = 64, 64, 16, 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, default=16)
    a = parser.parse_args()
    fields: dict[str, float] = {"layers": a.layers, "depth": a.depth}
    with tempfile.TemporaryDirectory() as folder:
        for top_k in (2, 8):
            options = run_options(memory="100%", threads=1, context=a.depth + a.tokens)
            bundle = _make_bundle(Path(folder), n_layers=a.layers, top_k=top_k)
            with open_session(bundle, options, tokenizer=object()) as session:
                if top_k == 2:
                    fields |= _decode(session, a.layers, a.tokens, rounds=a.rounds, depth=a.depth)
                fields |= _experts(session, top_k, rounds=a.rounds)
    fields["load_average"] = os.getloadavg()[0]
    for name, value in fields.items():
        print(f"{name:<40} {value:>9.3f}", file=sys.stderr)
    print(json.dumps({name: round(value, 4) for name, value in fields.items()}))


def _make_bundle(folder: Path, *, n_layers: int, top_k: int) -> Path:
    config = MixtralConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=_INNER,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=_N_EXPERTS,
        num_experts_per_tok=top_k,
    )
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"top{top_k}")
    out = folder / f"bundle{top_k}"
    model = LocatedModel(folder=folder / f"top{top_k}", name="overhead")
    pack_bundle(model, parse_pack_options(out=out, bits="4"))
    return out


def _decode(
    session: Session, n_layers: int, n_tokens: int, *, rounds: int, depth: int
) -> dict[str, float]:
    """Milliseconds per layer and token: without experts, with them, and of linears alone."""
    no_op = _decode_s(session, n_tokens, rounds, depth, no_op=True)
    whole = _decode_s(session, n_tokens, rounds, depth, no_op=False)
    linears = [m for m in session.model.modules() if isinstance(m, torch.nn.Linear)]
    x = torch.randn(1, 1, _HIDDEN)

    @torch.inference_mode()
    def run_linears() -> None:
        for module in linears:
            module(x)

    linear_s = _least_median(run_linears, rounds, 20)
    return {
        "no_op_ms_per_layer": 1e3 * no_op / n_layers,
        "linears_ms_per_layer": 1e3 * linear_s / n_layers,
        "with_experts_ms_per_layer": 1e3 * whole / n_layers,
    }


@torch.inference_mode()
def _decode_s(session: Session, n_tokens: int, rounds: int, depth: int, *, no_op: bool) -> float:
    runner = session.runner
    session.skeleton.set_experts_function(_nothing if no_op else runner)
    session.prompt_tokens = 0
    medians = []
    for _ in range(rounds):
        cache = session.new_cache()
        ids = torch.randint(0, _VOCABULARY, (1, depth + n_tokens))
        session.model(input_ids=ids[:, :depth], past_key_values=cache)
        times = []
        for position in range(depth, depth + n_tokens):
            start = time.thread_time()
            session.model(input_ids=ids[:, position : position + 1], past_key_values=cache)
            times.append(time.thread_time() - start)
        medians.append(statistics.median(times))
    return min(medians)


def _nothing(call: LayerCall) -> torch.Tensor:
    return call.hidden


def _kernel_alone(
    module: torch.nn.Module, weights: Mapping[str, Weight], x: torch.Tensor
) -> Callable[[], None]:
    """A call of the compiled kernel with everything prepared."""
    first, second = (
        kernels._Described(weights[name], None) for name in ("gate_up_proj", "down_proj")
    )
    gate = gate_of(module)
    assert gate is not None and kernels.is_native()
    packed_gate, out = gate.packed, torch.empty_like(x)
    x_at, out_at = x.data_ptr(), out.data_ptr()

    def run(_keep_alive: tuple[object, ...] = (weights, x, out)) -> None:
        kernels._compiled.expert(first.packed, packed_gate, second.packed, x_at, 1, out_at)

    return run


def _least_median(run: Callable[[], object], rounds: int, repetitions: int) -> float:
    """Seconds of one run: the median of each round, the least of the rounds."""
    medians = []
    for _ in range(rounds):
        times = []
        for _ in range(repetitions):
            start = time.thread_time()
            for _ in range(_RUNS_TOGETHER):
                run()
            times.append((time.thread_time() - start) / _RUNS_TOGETHER)
        medians.append(statistics.median(times))
    return min(medians)


def _experts(session: Session, top_k: int, *, rounds: int) -> dict[str, float]:
    """Microseconds per active expert of one layer call, one token, everything resident."""
    modules = session.skeleton.layers[0]
    hidden = torch.randn(1, _HIDDEN)
    index = torch.randperm(_N_EXPERTS)[:top_k][None]
    call = LayerCall(
        layer=modules.layer,
        module=modules.experts,
        hidden=hidden,
        index=index,
        weight=torch.rand(1, top_k),
        router_logits=None,
    )
    session.runner.forward = Forward(phase="decode")
    supply = session.runner.store.acquire(modules.layer, [int(index[0, 0])], PhaseCounters())
    weights = next(supply)[1].to_host()
    with torch.inference_mode():
        session.runner(call)
        whole = _least_median(lambda: session.runner(call), rounds, 60)
        forward = _least_median(
            lambda: expert_forward(modules.experts, weights, hidden), rounds, 60
        )
        kernel = _least_median(_kernel_alone(modules.experts, weights, hidden), rounds, 60)
    return {
        f"top{top_k}_call_us": 1e6 * whole,
        f"top{top_k}_expert_forward_us": 1e6 * forward,
        f"top{top_k}_kernel_us": 1e6 * kernel,
        f"top{top_k}_beyond_kernel_us_per_expert": 1e6 * (whole / top_k - kernel),
    }


if __name__ == "__main__":
    main()
