"""Quality of the demo model on the held-out part of the built-in text, with its criteria."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

from moe_tool.demo.training import token_stream
from moe_tool.text.builtin import builtin_documents
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import parse_sources

MAX_WEIGHT_BYTES = 8_000_000
MAX_SHARE_OF_UNIGRAM = 1 / 6
MAX_LOAD_SKEW = 3.0
MIN_DOMAIN_DISTANCE = 0.15

_SEQ_LEN = 512
_SEQUENCES_PER_FORWARD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoFigures:
    """Measurements on whole sequences of `builtin:eval`, docs and code in equal parts."""

    tokens: int
    """Tokens read; all but the first of each sequence are predicted."""
    perplexity: float
    """exp of the mean negative log-likelihood per predicted token, float32 arithmetic."""
    unigram_perplexity: float
    """Perplexity of the tokens by their frequency in the train part, averaged over both domains,
    with add-one smoothing."""
    perplexity_by_domain: dict[str, float]
    unigram_perplexity_by_domain: dict[str, float]
    load_skew: list[float]
    """Load of the most used expert over the mean load, by layer, both domains pooled."""
    least_load: list[float]
    """Load of the least used expert over the mean load, by layer; 0 is a dead expert."""
    domain_distance: list[float]
    """Total variation between the domains' loads, by layer, 0 (equal) to 1 (disjoint)."""


def measure_demo_model(folder: Path, *, n_tokens: int = 24576) -> DemoFigures:
    """Return the figures of the checkpoint in `folder` on about `n_tokens` held-out tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sequences = build_sequences(
        parse_sources(["builtin:eval"]),
        tokenizer,
        vocabulary=model.config.vocab_size,
        n_tokens=n_tokens,
        seq_len=_SEQ_LEN,
        holdout=0,
        seed=0,
    )
    loss, chosen = _forward(model, sequences.ids)  # [N, S - 1], [N, L, E]
    unigram = -np.log(_unigram_frequency(tokenizer, sequences.domains))[sequences.ids[:, 1:]]
    load = np.stack(
        [chosen[sequences.domain == index].sum(axis=0) for index in range(len(sequences.domains))]
    )  # [domains, L, E]
    pooled = load.sum(axis=0)
    relative = pooled / pooled.mean(axis=1, keepdims=True)  # [L, E]
    share = load / load.sum(axis=2, keepdims=True)
    return DemoFigures(
        tokens=sequences.ids.size,
        perplexity=math.exp(loss.mean()),
        unigram_perplexity=math.exp(unigram.mean()),
        perplexity_by_domain=_perplexity_by_domain(loss, sequences),
        unigram_perplexity_by_domain=_perplexity_by_domain(unigram, sequences),
        load_skew=relative.max(axis=1).tolist(),
        least_load=relative.min(axis=1).tolist(),
        domain_distance=(np.abs(share[0] - share[1]).sum(axis=1) / 2).tolist(),
    )


def unmet_criteria(figures: DemoFigures, *, weight_bytes: int) -> list[str]:
    """Return one sentence for each criterion that the model fails."""
    ratio = figures.perplexity / figures.unigram_perplexity
    skew, distance = max(figures.load_skew), float(np.mean(figures.domain_distance))
    checks = [
        (weight_bytes <= MAX_WEIGHT_BYTES, f"{weight_bytes} bytes, {MAX_WEIGHT_BYTES} allowed"),
        (ratio <= MAX_SHARE_OF_UNIGRAM, f"perplexity is {ratio:.3f} of the unigram baseline's"),
        (min(figures.least_load) > 0, "an expert is never used"),
        (skew <= MAX_LOAD_SKEW, f"a layer's largest expert has {skew:.2f} times the mean load"),
        (distance >= MIN_DOMAIN_DISTANCE, f"the domains' loads differ by {distance:.3f} only"),
    ]
    return [sentence for holds, sentence in checks if not holds]


@torch.inference_mode()
def _forward(model: MixtralForCausalLM, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses of predicted tokens [N, S - 1] and each sequence's expert loads
    [N, L, E]."""
    losses, chosen = [], []
    for start in range(0, len(ids), _SEQUENCES_PER_FORWARD):
        batch = torch.from_numpy(ids[start : start + _SEQUENCES_PER_FORWARD]).long()  # [B, S]
        output = model(batch, use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        losses.append(loss.view(len(batch), -1).double().numpy())
        logits = torch.stack(output.router_logits, dim=1)  # [B * S, L, E]
        top = logits.topk(model.config.num_experts_per_tok, dim=2).indices  # [B * S, L, K]
        votes = F.one_hot(top, logits.shape[2]).sum(dim=2)  # [B * S, L, E]
        chosen.append(votes.view(*batch.shape, *votes.shape[1:]).sum(dim=1).numpy())
    return np.concatenate(losses), np.concatenate(chosen)


def _unigram_frequency(tokenizer: PreTrainedTokenizerFast, domains: tuple[str, ...]) -> np.ndarray:
    """Return the frequency of every token in the train part, [V] float64, positive."""
    frequencies = []
    for domain in domains:
        texts = builtin_documents(domain, part="train").values()
        counts = 1.0 + np.bincount(token_stream(tokenizer, list(texts)), minlength=len(tokenizer))
        frequencies.append(counts / counts.sum())
    return np.asarray(np.mean(frequencies, axis=0))


def _perplexity_by_domain(loss: np.ndarray, sequences: TokenSequences) -> dict[str, float]:
    return {
        domain: math.exp(loss[sequences.domain == index].mean())
        for index, domain in enumerate(sequences.domains)
    }
