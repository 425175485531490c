"""Train MoLE beside a dense model and an ordinary MoE of equal active parameters; print losses.

All models see the same batches of the same text for the same steps. A MoLE's experts count as no
active parameters: at run time they are rows of a table. Source: arXiv:2503.15798, table 2, which
is the same comparison at 160M to 1B active parameters and 100B tokens.

    python benchmarks/mole_training.py --train train.txt --eval eval.txt [--save DIR]
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moe_tool.demo import demo_model_path
from moe_tool.demo.training import per_layer_balance_loss, token_stream
from moe_tool.models.mole.config import MoleConfig
from moe_tool.models.mole.modeling import MoleForCausalLM
from moe_tool.models.tokenizer import load_tokenizer

WIDTH, MLP_WIDTH, N_LAYERS = 96, 288, 4
MOE_EXPERTS, MOE_TOP_K = 10, 2
SEQ_LEN = 256
PEAK_LR, WARMUP_STEPS, BALANCE_WEIGHT = 3e-3, 40, 0.01
EVAL_WINDOWS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One architecture of the table."""

    name: str
    make: Callable[[dict[str, Any]], Any]
    inactive: Callable[[str], float]
    """Share of a parameter, by name, that no token uses at run time"""


def candidates() -> list[Candidate]:
    """Return dense, MoE, and MoLE with 4 and 16 experts of width 4 d."""
    return [
        Candidate(
            name="dense",
            make=lambda common: LlamaForCausalLM(
                LlamaConfig(**common, intermediate_size=MLP_WIDTH)
            ),
            inactive=lambda name: 0.0,
        ),
        Candidate(name="moe", make=_moe, inactive=_idle_experts),
        *(
            Candidate(
                name=f"mole-{n}",
                make=lambda common, n=n: MoleForCausalLM(
                    MoleConfig(
                        **common,
                        intermediate_size=MLP_WIDTH,
                        num_experts=n,
                        expert_intermediate_size=4 * WIDTH,
                    )
                ),
                inactive=lambda name: float("expert" in name),
            )
            for n in (4, 16)
        ),
    ]


def _moe(common: dict[str, Any]) -> MixtralForCausalLM:
    model = MixtralForCausalLM(
        MixtralConfig(
            **common,
            intermediate_size=MLP_WIDTH // MOE_TOP_K,
            num_local_experts=MOE_EXPERTS,
            num_experts_per_tok=MOE_TOP_K,
        )
    )
    model.set_experts_implementation("grouped_mm")
    return model


def _idle_experts(name: str) -> float:
    return 1 - MOE_TOP_K / MOE_EXPERTS if ".experts." in name else 0.0


def batches(stream: np.ndarray, n_sequences: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield [n_sequences, SEQ_LEN + 1] int64 windows at random places."""
    rng = np.random.default_rng(seed)
    window = np.arange(SEQ_LEN + 1)
    while True:
        starts = rng.integers(0, len(stream) - len(window), size=n_sequences)
        yield torch.from_numpy(stream[starts[:, None] + window]).long()


def train(model: Any, stream: np.ndarray, *, steps: int, n_sequences: int, seed: int) -> None:
    """Train with AdamW, a warm-up and a cosine down to a tenth of the peak rate."""
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    is_moe = isinstance(model, MixtralForCausalLM)
    model.train()
    for step, ids in zip(range(steps), batches(stream, n_sequences, seed), strict=False):
        done = step / steps
        share = min((step + 1) / WARMUP_STEPS, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * share
        extra = {"output_router_logits": True} if is_moe else {}
        output = model.model(input_ids=ids[:, :-1], use_cache=False, **extra)
        logits = model.lm_head(output.last_hidden_state)
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        if is_moe:  # a MoLE has no balance loss: it hurt in the paper
            balance = per_layer_balance_loss(output.router_logits, top_k=MOE_TOP_K)
            loss = loss + BALANCE_WEIGHT * balance
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def loss_on(model: Any, stream: np.ndarray) -> float:
    """Return the mean loss in nats per token over windows spread evenly over a stream."""
    starts = np.linspace(0, len(stream) - SEQ_LEN - 2, EVAL_WINDOWS).astype(int)
    losses = []
    with torch.inference_mode():
        for start in starts:
            ids = torch.from_numpy(stream[start : start + SEQ_LEN + 1]).long()[None]
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
            losses.append(functional.cross_entropy(logits, ids[0, 1:]).item())
    return statistics.fmean(losses)


def active_parameters(model: Any, candidate: Candidate) -> int:
    """Return the parameters that a token uses at run time, its embedding's row not counted."""
    return round(
        sum(
            p.numel() * (1 - candidate.inactive(name))
            for name, p in model.named_parameters()
            if "embed_tokens" not in name
        )
    )


def main() -> None:
    """Train every model for every seed, and print a row for each and the table of means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, nargs="+", help="UTF-8 texts")
    parser.add_argument("--eval", type=Path, required=True, nargs="+", help="other texts")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sequences", type=int, default=4, help=f"of {SEQ_LEN} tokens a step")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path, help="write the checkpoints of the first seed here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = load_tokenizer(demo_model_path())
    train_stream, eval_stream = (
        token_stream(tokenizer, [path.read_text(encoding="utf-8") for path in paths])
        for paths in (given.train, given.eval)
    )
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    losses: dict[str, list[float]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for seed in range(given.seeds):
        for candidate in candidates():
            torch.manual_seed(seed)
            model = candidate.make(common)
            begun = time.monotonic()
            train(model, train_stream, steps=given.steps, n_sequences=given.sequences, seed=seed)
            seconds = time.monotonic() - begun
            losses.setdefault(candidate.name, []).append(loss_on(model, eval_stream))
            sizes[candidate.name] = (
                active_parameters(model, candidate),
                sum(p.numel() for p in model.parameters()),
            )
            row = {"seed": seed, "model": candidate.name, "loss": losses[candidate.name][-1]}
            print(json.dumps(row | {"seconds": round(seconds, 1)}), file=sys.stderr, flush=True)
            if given.save is not None and seed == 0:
                model.save_pretrained(given.save / candidate.name)
                tokenizer.save_pretrained(given.save / candidate.name)
    print("| model | active parameters | trained parameters | loss, nats per token | by seed |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name, found in losses.items():
        each = ", ".join(f"{loss:.4f}" for loss in found)
        active, trained = sizes[name]
        print(f"| {name} | {active} | {trained} | {statistics.fmean(found):.4f} | {each} |")


if __name__ == "__main__":
    main()
