"""Training of the demo model: tokenizer, a dense stage, upcycling, a mixture stage."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moe_tool.demo.upcycling import upcycle
from moe_tool.text.builtin import BUILTIN_DOMAINS, builtin_documents

Progress = Callable[[str], None]

SEED = 20
BOS_TOKEN, EOS_TOKEN = "<s>", "</s>"
VOCABULARY = 2048
N_EXPERTS, TOP_K = 16, 2
REDRAWN_SHARE = 0.5
# The docs are a twentieth of the text. At three eighths of every batch they are learned but not
# memorised, and the balance loss sees a mix near the even one that is measured.
DOMAIN_SHARE = {"docs": 0.375, "code": 0.625}
_WEIGHT_DECAY = 0.1
_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Settings of one training stage."""

    name: str
    n_steps: int
    n_sequences: int
    """Sequences per step, divided by DOMAIN_SHARE."""
    seq_len: int
    peak_lr: float
    """Learning rate after `warmup_steps`; then a cosine down to `final_lr_share` of it."""
    final_lr_share: float
    warmup_steps: int
    balance_weight: float
    """Weight of the per-layer balance loss; 0: none."""


DENSE_STAGE = Stage(
    name="dense",
    n_steps=800,
    n_sequences=12,
    seq_len=256,
    peak_lr=4e-3,
    final_lr_share=0.3,
    warmup_steps=60,
    balance_weight=0.0,
)
MIXTURE_STAGE = Stage(
    name="mixture",
    n_steps=1100,
    n_sequences=8,
    seq_len=512,
    peak_lr=2.5e-3,
    final_lr_share=0.0,
    warmup_steps=60,
    balance_weight=0.05,
)


def train_demo_model(out: Path, *, quick: bool, progress: Progress) -> None:
    """Train the demo model from scratch and write its checkpoint into the folder `out`.

    Deterministic for one number of threads. About 15 minutes on one core; with `quick`, three steps
    per stage, for tests.
    """
    torch.manual_seed(SEED)
    dense_stage, mixture_stage = DENSE_STAGE, MIXTURE_STAGE
    if quick:
        dense_stage = replace(DENSE_STAGE, n_steps=3, n_sequences=4, seq_len=64)
        mixture_stage = replace(MIXTURE_STAGE, n_steps=3, n_sequences=4, seq_len=64)
    texts = {
        domain: list(builtin_documents(domain, part="train").values()) for domain in BUILTIN_DOMAINS
    }
    repeats = round(
        sum(map(len, texts["code"])) / sum(map(len, texts["docs"])) / 3
    )  # docs: a quarter of what BPE counts
    tokenizer = train_tokenizer(texts["docs"] * repeats + texts["code"], vocabulary=VOCABULARY)
    streams = {domain: token_stream(tokenizer, texts[domain]) for domain in BUILTIN_DOMAINS}
    progress(
        "train tokens: "
        + ", ".join(f"{domain} {len(stream)}" for domain, stream in streams.items())
    )

    dense = MixtralForCausalLM(_config(n_experts=1, top_k=1))
    dense.set_experts_implementation("eager")
    run_stage(dense, streams, dense_stage, seed=SEED, progress=progress)
    mixture = upcycle(
        dense, n_experts=N_EXPERTS, top_k=TOP_K, redrawn_share=REDRAWN_SHARE, seed=SEED
    )
    mixture.set_experts_implementation("grouped_mm")
    run_stage(mixture, streams, mixture_stage, seed=SEED + 1, progress=progress)

    mixture.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of exactly `vocabulary` entries.

    It puts <s> (id 0) before a text; </s> is id 1. Deterministic for the same texts in the same
    order. Every string can be encoded: the 256 bytes are entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, 0)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return all texts as one array of token ids, each as <s> text </s>: [T] int32."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return np.concatenate(
        [np.array([*encoding.ids, tokenizer.eos_token_id], np.int32) for encoding in encodings]
    )


def run_stage(
    model: MixtralForCausalLM,
    streams: dict[str, np.ndarray],
    stage: Stage,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Train `model` in place with AdamW on random windows of the streams."""
    optimizer = _optimizer(model, lr=stage.peak_lr)
    batches = _batches(streams, stage, seed=seed)
    model.train()
    for step in range(stage.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.peak_lr * _lr_share(step, stage)
        ids = torch.from_numpy(next(batches)).long()  # [B, S + 1]
        output = model.model(ids[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state)  # [B, S, V]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        balance = per_layer_balance_loss(
            output.router_logits, top_k=model.config.num_experts_per_tok
        )
        torch.autograd.backward(loss + stage.balance_weight * balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == stage.n_steps - 1:
            progress(
                f"{stage.name} step {step}/{stage.n_steps}:"
                f" loss {loss.item():.3f}, balance {balance.item():.3f}"
            )
    model.train(False)


def per_layer_balance_loss(router_logits: tuple[torch.Tensor, ...], *, top_k: int) -> torch.Tensor:
    """Return the Switch balance loss, computed per layer and averaged: 1 if every layer is even,
    scalar float32.

    transformers' auxiliary loss pools the layers, so one may collapse while another compensates.
    Source: arXiv:2101.03961, eq. 4-6, with the share of the K chosen experts in place of the first.

    Args:
        router_logits: per layer [T, E].
    """
    losses = []
    for logits in router_logits:
        n_experts = logits.shape[1]
        probability = logits.float().softmax(dim=1)  # [T, E]
        chosen = probability.topk(top_k, dim=1).indices  # [T, K]
        share = torch.bincount(chosen.flatten(), minlength=n_experts) / chosen.numel()  # [E]
        losses.append(n_experts * (share * probability.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def _config(*, n_experts: int, top_k: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=n_experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )


def _optimizer(model: MixtralForCausalLM, *, lr: float) -> torch.optim.AdamW:
    matrices = [
        p for name, p in model.named_parameters() if p.ndim >= 2 and "embed_tokens" not in name
    ]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed_tokens" in name]
    groups = [
        {"params": matrices, "weight_decay": _WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def _lr_share(step: int, stage: Stage) -> float:
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / (stage.n_steps - stage.warmup_steps)
    return stage.final_lr_share + (1 - stage.final_lr_share) * 0.5 * (1 + math.cos(math.pi * done))


def _batches(streams: dict[str, np.ndarray], stage: Stage, *, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of [B, S + 1] int32 windows at random places, divided by DOMAIN_SHARE."""
    rng = np.random.default_rng(seed)
    window = np.arange(stage.seq_len + 1)
    while True:
        rows = []
        for domain, stream in streams.items():
            n_rows = round(DOMAIN_SHARE[domain] * stage.n_sequences)
            starts = rng.integers(0, len(stream) - len(window), size=n_rows)
            rows.append(stream[starts[:, None] + window])
        yield np.concatenate(rows)
