"""Work of `evaluate` for a lookup bundle: its predictions of a text beside the checkpoint's."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_tool.artifacts.evaluation_report import EvaluationReport
from moe_tool.artifacts.identity import require_same_model
from moe_tool.artifacts.lookup_manifest import LookupManifest
from moe_tool.artifacts.run_result import RunSetup
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import WrongModelError
from moe_tool.evaluation.divergence import (
    compare_logits,
    divergence_scratch_bytes,
    negative_log_likelihood,
)
from moe_tool.evaluation.evaluate import EvaluateOptions, read_text
from moe_tool.evaluation.figures import Measured, policy_row
from moe_tool.evaluation.stepwise import N_PROMPT_TOKENS, TokenCosts, n_scored, reference_chunk
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.lookup.lookup_account import chunk_of
from moe_tool.lookup.open_lookup import lookup_setup, open_lookup
from moe_tool.lookup.pack_lookup import lookup_identity
from moe_tool.models.kv_cache import new_kv_cache
from moe_tool.models.locate import LocatedModel
from moe_tool.models.mole.config import MoleConfig
from moe_tool.models.mole.load_mole import (
    build_mole,
    check_tensors,
    is_mole,
    largest_bytes,
    load_tensors,
    skeleton_bytes,
)
from moe_tool.models.mole.modeling import MoleForCausalLM
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.working_set import Workload, kv_cache_bytes
from moe_tool.text.sources import TextSource

_REMEDY = "--reference needs the checkpoint that the bundle was packed from"


def evaluate_lookup(
    folder: Path,
    sources: Sequence[TextSource],
    options: EvaluateOptions,
    *,
    reference: LocatedModel | None = None,
    progress: Progress = SILENT,
) -> EvaluationReport:
    """Measure a lookup bundle's perplexity, and its divergence from the checkpoint, on a text.

    Figures have the terms of `evaluate`: the first two tokens of a sequence are not scored, and a
    token costs what it reads when it is decoded, which is one row, as no row stays in memory.
    Every token has the same answer in any forward, so that many go through at once.

    Args:
        options: text, memory, seed and threads; the rest has no meaning here.
        reference: the checkpoint that the bundle was packed from, loaded whole in float32.

    Raises:
        UsageError, BudgetError: as `open_lookup`.
        DataSourceError, NotFoundError: the text cannot be read.
        WrongModelError: the reference is another model.
        CorruptArtifactError: the bundle or the checkpoint is damaged.
    """
    start = time.perf_counter()
    bundle = LookupBundle.open(folder)
    vocabulary = bundle.manifest.vocabulary
    _, text = read_text(folder, sources, options, vocabulary=vocabulary, progress=progress)
    ids = torch.from_numpy(text.ids.astype(np.int64))
    measured, setup = _measure(bundle, ids, options, reference, progress)
    return EvaluationReport(
        bundle=str(folder),
        setup=setup,
        gates=options.gates,
        seed=options.seed,
        sequences=len(ids),
        seq_len=ids.shape[1],
        rows=(policy_row(setup.policy, measured, text, seed=options.seed),),
        at_no_more_bytes=(),
        dominating=(),
        skipped={},
        sparsity=0.0,
        whole_bytes_per_token=float(bundle.manifest.row_bytes),
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _measure(
    bundle: LookupBundle,
    ids: torch.Tensor,
    options: EvaluateOptions,
    reference: LocatedModel | None,
    progress: Progress,
) -> tuple[Measured, RunSetup]:
    """Open bundle and checkpoint inside the budget, and score every sequence of [N, S]."""
    with ExitStack() as stack:
        n_bytes = _logits_bytes(ids.shape[1], bundle.manifest.vocabulary, reference)
        beside, load = {"logits of a sequence": n_bytes}, None
        if reference is not None:
            load = stack.enter_context(_checked(reference, bundle.manifest))
            beside |= _reference_bytes(load, ids.shape[1])
        opened = stack.enter_context(
            open_lookup(
                bundle,
                memory=options.memory,
                positions=ids.shape[1],
                threads=options.threads,
                beside=beside,
                progress=progress,
            )
        )
        truth = None if load is None else load()
        row_bytes = bundle.manifest.row_bytes
        return _score(opened.model, truth, ids, row_bytes, progress), lookup_setup(opened)


class _Reference:
    """A MoLE's checkpoint that fits the bundle; called, it is loaded."""

    def __init__(self, model: MoleForCausalLM, checkpoint: Checkpoint) -> None:
        self.model, self._checkpoint = model, checkpoint

    def __call__(self) -> MoleForCausalLM:
        load_tensors(self.model, self._checkpoint)
        return self.model


@contextmanager
def _checked(located: LocatedModel, manifest: LookupManifest) -> Iterator[_Reference]:
    """Yield the checkpoint, whose headers and identity are right, before its weights are read."""
    if not is_mole(located.folder):
        raise WrongModelError(
            f"{located.name} is no mixture of lookup experts, the bundle is one", hint=_REMEDY
        )
    model = build_mole(located.folder)
    if model.config.experts_form != "ffn":
        raise WrongModelError(f"the experts of {located.name} are a table already", hint=_REMEDY)
    with Checkpoint.open_folder(located.folder) as checkpoint:
        check_tensors(model, checkpoint, located.folder)
        require_same_model(
            manifest.identity,
            lookup_identity(located, checkpoint),
            artifact="the bundle",
            remedy=_REMEDY,
        )
        yield _Reference(model, checkpoint)


@torch.inference_mode()
def _score(
    model: MoleForCausalLM,
    truth: MoleForCausalLM | None,
    ids: torch.Tensor,
    row_bytes: int,
    progress: Progress,
) -> Measured:
    """Score every sequence of [N, S], one at a time."""
    shape = (len(ids), n_scored(ids.shape[1]))
    nll, costs = np.zeros(shape), TokenCosts.zeros(shape)
    kl_source, nll_source = (None if truth is None else np.zeros(shape) for _ in range(2))
    costs.accesses[:], costs.reads[:], costs.bytes_read[:] = 1, 1, row_bytes
    costs.expected[:] = np.nan
    scored = slice(N_PROMPT_TOKENS, ids.shape[1] - 1)
    progress.begin("evaluate", len(ids), "sequences")
    for row, sequence in enumerate(ids):
        targets = sequence[scored.start + 1 : scored.stop + 1]
        ours = _logits(model, sequence)[scored]
        nll[row] = negative_log_likelihood(ours, targets)
        if truth is not None:
            assert kl_source is not None and nll_source is not None
            theirs = _logits(truth, sequence)[scored]
            nll_source[row] = negative_log_likelihood(theirs, targets)
            kl_source[row] = compare_logits(theirs, ours).kl
        progress.advance()
    progress.end()
    return Measured(
        kl=np.zeros(shape),  # of exact from exact
        agrees=np.ones(shape, dtype=bool),
        nll=nll,
        nll_exact=nll,
        kl_source=kl_source,
        kl_source_exact=kl_source,
        nll_source=nll_source,
        costs=costs,
    )


def _logits(model: MoleForCausalLM, sequence: torch.Tensor) -> torch.Tensor:
    """Return the logits of a sequence [S], [S, V]."""
    out = torch.empty(len(sequence), model.config.vocab_size)
    cache = new_kv_cache(model.config, n_positions=len(sequence))
    chunk = _chunk(model.config)
    for start in range(0, len(sequence), chunk):
        part = sequence[None, start : start + chunk]
        found: Any = model(input_ids=part, past_key_values=cache, use_cache=True)
        out[start : start + chunk] = found.logits[0]
    return out


def _chunk(config: MoleConfig) -> int:
    """Return the tokens of a forward."""
    return min(chunk_of(config), reference_chunk(config.vocab_size))


def _logits_bytes(seq_len: int, vocabulary: int, reference: LocatedModel | None) -> int:
    """Return the bytes of a sequence's logits, of a forward's, and of their comparison."""
    copies = seq_len * (1 if reference is None else 2) + 3 * reference_chunk(vocabulary)
    return 4 * vocabulary * copies + divergence_scratch_bytes(vocabulary)


def _reference_bytes(reference: _Reference, seq_len: int) -> dict[str, int]:
    """Return the bytes that the checkpoint takes beside the bundle, by name."""
    model, config = reference.model, reference.model.config
    one = config.num_experts * 2 * config.hidden_size + 2 * config.expert_intermediate_size
    workload = Workload(batch=1, positions=seq_len, prompt_tokens=seq_len)
    return {
        "the checkpoint": skeleton_bytes(model) + largest_bytes(model),
        "the checkpoint's forward": kv_cache_bytes(config, workload) + 4 * _chunk(config) * one,
    }
