"""Norms and routers of a bundle whose codes are tuned: trained end to end, judged, and kept or not.

ECO (arXiv:2601.22101) trains what is not quantized together with the codes, by the loss of the
language model. Here the codes are trained first and then stay, so that what norms and routers add
can be judged apart and undone; their loss is KL(checkpoint || bundle) of the whole model.
"""

import time
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.bundle_sections import TunedFloats
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.training_state import (
    TrainingState,
    order_digest,
    read_training_state,
    write_training_state,
)
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_stream import LayerStream
from moe_tool.progress import Progress
from moe_tool.text.sequences import TokenSequences
from moe_tool.tuning.copied_bundle import CopiedBundle
from moe_tool.tuning.float_weights import FloatWeights, find_floats
from moe_tool.tuning.judge_floats import LEAST_HELD_OUT, FloatVerdict, judge_floats
from moe_tool.tuning.paired_layers import BATCH_TOKENS
from moe_tool.tuning.streamed_bundle import StreamedBundle
from moe_tool.tuning.train_floats import FloatPlan, FloatTraining
from moe_tool.tuning.tune_options import TuneOptions

_SAVE_EVERY_S = 20.0


def find_trainable(
    folder: Path, opened: OpenedModel, bundle: BundleReader, options: TuneOptions
) -> FloatWeights:
    """Return the norms and routers that the options name.

    Args:
        folder: the checkpoint.
        opened: the same checkpoint.

    Raises:
        UnsupportedModelError: the model does not store them as it uses them.
        UsageError: the bundle holds one as codes.
    """
    stream = LayerStream(folder, opened.checkpoint)
    stream.require_plain("tuning")
    floats = find_floats(stream, norms=options.norms, router=options.router)
    lacking = floats.start.keys() - {tensor.name for tensor in bundle.manifest.skeleton}
    if lacking:
        raise UsageError(
            f"the skeleton of {bundle.folder} holds {min(lacking)} as codes, which are not trained",
            hint="pack it without --skeleton-bits, or leave --norms and --router out",
        )
    return floats


def require_held_out(sequences: TokenSequences, options: TuneOptions) -> None:
    """Refuse a text of which too little is held out to choose and to judge by.

    Raises:
        UsageError: there are too few sequences.
    """
    if int(sequences.held_out.sum()) < LEAST_HELD_OUT:
        raise UsageError(
            f"--tokens {options.tokens}: norms and routers are judged on at least "
            f"{LEAST_HELD_OUT} held-out sequences",
            hint="more --tokens, or a smaller --seq-len",
        )


def tune_floats(
    folder: Path,
    opened: OpenedModel,
    copied: CopiedBundle,
    floats: FloatWeights,
    sequences: TokenSequences,
    options: TuneOptions,
    progress: Progress,
) -> None:
    """Train norms and routers behind the codes of the new bundle, and let it keep what pays.

    Args:
        folder: the checkpoint.
        opened: the same checkpoint.
        copied: the new bundle, with all of its records.

    Raises:
        CorruptArtifactError, StorageError: the state of an interrupted training is damaged, or the
            disk refuses.
    """
    bundle = StreamedBundle(
        LayerStream(folder, opened.checkpoint),
        floats,
        lambda layer: {e: copied.written_expert(layer, e) for e in copied.experts(layer)},
    )
    ids = torch.from_numpy(sequences.ids.astype(np.int64))
    is_held_out = torch.from_numpy(sequences.held_out)
    plan = FloatPlan(
        ids=ids[~is_held_out],
        n_steps=options.steps,
        at_once=max(1, options.batch // ids.shape[1]),
        rate=options.first_float_rate,
        seed=options.seed,
    )
    micro_batch = max(1, BATCH_TOKENS // ids.shape[1])
    with torch.no_grad():
        training = _train(bundle, copied, plan, micro_batch, progress)
        progress.note("judge norms and routers on held-out text")
        verdict = judge_floats(
            bundle, training.values, ids[is_held_out], micro_batch=micro_batch, seed=options.seed
        )
    copied.keep_floats(_kept(floats, verdict), _section(floats, verdict, plan))


def _train(
    bundle: StreamedBundle,
    copied: CopiedBundle,
    plan: FloatPlan,
    micro_batch: int,
    progress: Progress,
) -> FloatTraining:
    """Train, or go on with a training that was interrupted."""
    training = FloatTraining(bundle.floats, plan)
    order = order_digest({"made_from": dict(copied.writer.spec.made_from)})
    path = copied.training_state
    reached = read_training_state(path, order, training.state(), n_steps=plan.n_steps)
    if reached is not None:
        training.restore(reached.tensors, step=reached.step)
        progress.note(f"resumed norms and routers after step {reached.step} of {plan.n_steps}")
        if training.step == plan.n_steps:
            return training
    exact = torch.cat(bundle.exact_states(torch.split(plan.ids, micro_batch)))
    progress.begin("tune norms and routers", plan.n_steps, "steps")
    progress.advance(training.step)
    saved_at = time.perf_counter()
    while training.step < plan.n_steps:
        training.advance(bundle, exact)
        progress.advance()
        if time.perf_counter() - saved_at > _SAVE_EVERY_S or training.step == plan.n_steps:
            write_training_state(
                path, order, TrainingState(step=training.step, tensors=training.state())
            )
            saved_at = time.perf_counter()
    progress.end()
    return training


def _kept(floats: FloatWeights, verdict: FloatVerdict) -> dict[str, torch.Tensor]:
    """Return the tensors that are no longer the checkpoint's."""
    names = [place.name for place in floats.places if verdict.shares[place.kind]]
    return {name: verdict.values[name] for name in names}


def _section(floats: FloatWeights, verdict: FloatVerdict, plan: FloatPlan) -> TunedFloats:
    return TunedFloats(
        norms=verdict.shares.get("norms"),
        router=verdict.shares.get("router"),
        tensors=tuple(_kept(floats, verdict)),
        rate=plan.rate,
        codes_alone=verdict.codes_alone,
        best=verdict.best,
        change_ci95=verdict.change_ci95,
        rerouted=tuple(verdict.rerouted.items()),
    )
