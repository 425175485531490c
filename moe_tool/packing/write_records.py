"""Writer of a bundle's records, from the weights alone or from the experts' inputs."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.artifacts.source_files import Part
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.expert_source import ExpertSource
from moe_tool.packing.calibrated_layers import CalibratedModel
from moe_tool.packing.expert_coding import coded
from moe_tool.packing.expert_records import MEASURED_TOKENS, ExpertRecords, MeasuredRecord
from moe_tool.packing.in_place import InPlace
from moe_tool.packing.plan_pack import PackJob
from moe_tool.progress import Progress
from moe_tool.quantization.weights import AnyWeight
from moe_tool.quantizers.registry import QUANTIZERS
from moe_tool.quantizers.rtn import nearest


def _nothing(_: BundleWriter) -> None:
    pass


def write_records(
    writer: BundleWriter,
    opened: OpenedModel,
    quantizer: Quantizer,
    progress: Progress,
    *,
    in_place: InPlace | None = None,
    after: Callable[[BundleWriter], None] = _nothing,
) -> None:
    """Write the missing records, one expert after the other; the next one is read meanwhile.

    Args:
        quantizer: one that needs no inputs; any if no codes are to be made.
        in_place: finds the records that stay in the checkpoint's files; None: there are none.
        after: called after every record.

    Raises:
        CorruptArtifactError: a weight to be quantized is NaN or infinite; names its expert.
        DiskFullError, StorageError: the disk refuses.
    """
    spec = QUANTIZERS[quantizer]
    quantize_expert = nearest if spec.needs_inputs else spec.make(None)
    progress.begin("pack experts", writer.n_written + len(writer.to_write), "experts")
    progress.advance(writer.n_written)
    wanted = list(writer.to_write)
    floats = [key for form, *key in wanted if not _is_kept(writer, form)]
    read = read_ahead(opened.experts, [(layer, expert) for layer, expert in floats])
    for form, layer, expert in wanted:
        with naming(opened, layer, expert):
            if _is_kept(writer, form):
                weights = kept_expert(opened.experts, layer, expert)
            else:
                weights = coded(next(read), writer.spec.forms[form].precision, quantize_expert)
        record = writer.forms[form].encode(weights)
        parts = _parts(writer, in_place, (form, layer, expert), record)
        writer.write_record(form, layer, expert, record, parts=parts)
        after(writer)
        progress.advance()
    progress.end()


def _parts(
    writer: BundleWriter,
    in_place: InPlace | None,
    key: tuple[int, int, int],
    record: torch.Tensor,
) -> tuple[Part, ...] | None:
    """Return where a record lies in the checkpoint's files; None: it is written."""
    form, layer, expert = key
    if in_place is None or form not in writer.spec.placed:
        return None
    return in_place.find(writer.forms[form], layer, expert, record)


def _is_kept(writer: BundleWriter, form: int) -> bool:
    return writer.spec.forms[form].precision.kind == "kept"


def kept_expert(source: ExpertSource, layer: int, expert: int) -> Mapping[str, AnyWeight]:
    """Return an expert in the codes on disk.

    Raises:
        CorruptArtifactError: it is stored in another way than the experts read before.
        StorageError: the checkpoint cannot be read.
    """
    found = source.read_kept(layer, expert)
    if found is None:
        raise CorruptArtifactError(
            "its codes are stored in another way than those of other experts",
            hint="download the checkpoint again, or pack rounded weights with --bits 8",
        )
    return found


def read_ahead(
    source: ExpertSource, keys: Sequence[ExpertKey]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield experts in order, reading the next one in the background.

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
    job: PackJob,
    tokens: TracedTokens,
    progress: Progress,
    *,
    in_place: InPlace | None = None,
) -> list[ExpertKey]:
    """Write the missing records with their measured errors, one layer in memory at a time.

    Returns:
        Experts fitted to other experts' tokens, since too few are routed to them.

    Raises:
        CorruptArtifactError: a weight to be quantized is NaN or infinite; names its expert.
        DiskFullError, StorageError: the disk refuses.
    """
    missing: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for form, layer, expert in writer.to_write:
        missing[layer][expert].append(form)
    unrouted = []
    progress.begin("pack experts", writer.n_written + len(writer.to_write), "records")
    progress.advance(writer.n_written)
    last = max(missing, default=-1)
    walk = CalibratedModel(job.folder, opened, tokens, hidden_bytes=job.hidden_bytes, rows=job.rows)
    for at in walk.layers(last=last):
        for expert, forms in missing[at.layer].items():
            sample = at.sample(expert, most_measured=MEASURED_TOKENS)
            if not sample.is_own:
                unrouted.append((at.layer, expert))
            records = ExpertRecords(sample, job.quantizer)
            for form in forms:
                plan = writer.spec.forms[form]
                with naming(opened, at.layer, expert):
                    if _is_kept(writer, form):
                        weights = kept_expert(opened.experts, at.layer, expert)
                        made = MeasuredRecord(record=writer.forms[form].encode(weights), eps=0.0)
                    else:
                        made = records.make(writer.forms[form], plan.precision, plan.role)
                parts = _parts(writer, in_place, (form, at.layer, expert), made.record)
                writer.write_record(
                    form,
                    at.layer,
                    expert,
                    made.record,
                    eps=made.eps,
                    base_eps=made.base_eps,
                    parts=parts,
                )
                progress.advance()
    progress.end()
    return unrouted


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
