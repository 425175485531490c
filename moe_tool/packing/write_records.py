"""Writes the records of a bundle: from the weights alone, or from what experts are given."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.artifacts.precision import ChannelPrecision, ExpertPrecision
from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.expert_form import ExpertForm
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.expert_source import ExpertSource
from moe_tool.packing.calibrated_layers import CalibratedModel, ExpertSample
from moe_tool.packing.channel_forms import ChannelForms
from moe_tool.packing.quantizers import calibrated, data_free
from moe_tool.packing.replicas import MEASURED_TOKENS, ExpertForms
from moe_tool.progress import Progress


def write_records(
    writer: BundleWriter, opened: OpenedModel, quantizer: Quantizer, progress: Progress
) -> None:
    """Write what is missing, one expert after the other; the next one is read meanwhile.

    Args:
        writer: of the bundle.
        opened: the model; its checkpoint is open.
        quantizer: one that needs no inputs, or any where there are no codes to be made.
        progress: told about every record.

    Raises:
        CorruptArtifactError: a weight to be quantized is NaN or infinite; names its expert.
        DiskFullError, StorageError: the disk refuses.
    """
    quantize_expert = data_free(quantizer)
    progress.begin("pack experts", writer.n_written + len(writer.to_write), "experts")
    progress.advance(writer.n_written)
    wanted = list(writer.to_write)
    read = read_ahead(opened.experts, [(layer, expert) for _, layer, expert in wanted])
    for (level, layer, expert), weights in zip(wanted, read, strict=True):
        form = writer.forms[level]
        assert isinstance(form, ExpertForm), "channels are made from what experts are given"
        with naming(opened, layer, expert):
            record = form.encode(weights, quantize_expert=quantize_expert)
        writer.write_record(level, layer, expert, record)
        progress.advance()
    progress.end()


def read_ahead(
    source: ExpertSource, keys: Sequence[ExpertKey]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield experts in order, each read while the one before it is at work.

    Raises:
        StorageError: the checkpoint cannot be read.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="expert-source") as thread:
        following: Future[dict[str, torch.Tensor]] | None = None
        for at, key in enumerate(keys):
            weights = source.read(*key) if following is None else following.result()
            following = thread.submit(source.read, *keys[at + 1]) if at + 1 < len(keys) else None
            yield weights


def write_calibrated(
    writer: BundleWriter,
    opened: OpenedModel,
    folder: Path,
    tokens: TracedTokens,
    quantizer: Quantizer,
    progress: Progress,
    *,
    hidden_bytes: int,
) -> list[ExpertKey]:
    """Write what is missing, one layer in memory at a time, each record with its measured error.

    Args:
        writer: of the bundle.
        opened: the model; its checkpoint is open.
        folder: of the checkpoint.
        tokens: of the profile: they go through the model once more.
        quantizer: of the experts.
        progress: told about every record.
        hidden_bytes: of the hidden states that are carried from layer to layer.

    Returns:
        Experts that were fitted to other experts' tokens, since few or none are sent to them.

    Raises:
        CorruptArtifactError: a weight to be quantized is NaN or infinite; names its expert.
        DiskFullError, StorageError: the disk refuses.
    """
    missing: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for level, *key in writer.to_write:
        missing[key[0]][key[1]].append(level)
    unrouted = []
    progress.begin("pack experts", writer.n_written + len(writer.to_write), "records")
    progress.advance(writer.n_written)
    last = max(missing, default=-1)
    walk = CalibratedModel(folder, opened, tokens, hidden_bytes=hidden_bytes)
    for layer in walk.layers(last=last):
        for expert, levels in missing[layer.layer].items():
            sample = layer.sample(expert, most_measured=MEASURED_TOKENS)
            if not sample.is_own:
                unrouted.append((layer.layer, expert))
            forms = _forms(sample, writer.precision, quantizer)
            for level in levels:
                with naming(opened, layer.layer, expert):
                    made = forms.make(writer.forms[level])
                writer.write_record(
                    level, layer.layer, expert, made.record, eps=made.eps, base_eps=made.base_eps
                )
                progress.advance()
    progress.end()
    return unrouted


def _forms(
    sample: ExpertSample, precision: ExpertPrecision, quantizer: Quantizer
) -> ExpertForms | ChannelForms:
    if isinstance(precision, ChannelPrecision):
        return ChannelForms(sample, precision, quantizer)
    return ExpertForms(sample, calibrated(quantizer, sample))


@contextmanager
def naming(opened: OpenedModel, layer: int, expert: int) -> Iterator[None]:
    """Name the expert in errors about its weights."""
    try:
        yield
    except CorruptArtifactError as error:
        raise CorruptArtifactError(
            f"layer {layer} expert {expert} of {opened.identity.name}: {error.message}",
            hint=error.hint,
        ) from error
