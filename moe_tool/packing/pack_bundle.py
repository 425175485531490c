"""Story of `pack`: read profile and buddy map, plan, write."""

from contextlib import closing
from pathlib import Path

from moe_tool.artifacts.identity import HubRevision
from moe_tool.errors import UsageError
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.generation_settings import read_generation_settings
from moe_tool.models.locate import LocatedModel
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.packing.discard_source import DiscardSource
from moe_tool.packing.in_place import InPlace
from moe_tool.packing.pack_inputs import read_pack_inputs
from moe_tool.packing.pack_options import PackOptions
from moe_tool.packing.plan_pack import plan_pack
from moe_tool.packing.source_notes import source_notes, tokenizer_notes
from moe_tool.packing.write_bundle import PackReport, write_bundle
from moe_tool.progress import SILENT, Progress


def pack_bundle(
    model: LocatedModel,
    options: PackOptions,
    *,
    profile: Path | None = None,
    buddies: Path | None = None,
    progress: Progress = SILENT,
) -> PackReport:
    """Open a checkpoint and compile it into a bundle; see `pack_opened`."""
    opened = open_model(model)
    with opened.checkpoint:
        return pack_opened(
            opened,
            model.folder,
            options,
            tokenizer=model.tokenizer_folder,
            hub=model.hub,
            profile=profile,
            buddies=buddies,
            progress=progress,
        )


def pack_opened(
    opened: OpenedModel,
    folder: Path,
    options: PackOptions,
    *,
    tokenizer: Path | None = None,
    hub: HubRevision | None = None,
    offline: bool = False,
    profile: Path | None = None,
    buddies: Path | None = None,
    progress: Progress = SILENT,
) -> PackReport:
    """Compile a checkpoint into a bundle; an interrupted run is resumed with the same options.

    Args:
        opened: the model; its checkpoint stays open and belongs to the caller.
        tokenizer: folder of the tokenizer; None: the checkpoint's.
        hub: revision that was downloaded; None: a local folder.
        offline: never use the network.

    Raises:
        MoeToolError: as `read_pack_inputs`, `plan_pack` and `write_bundle`.
    """
    # Both go into the bundle, so that a fault in them is told before anything is written.
    words = load_tokenizer(tokenizer or folder)
    read_generation_settings(folder)
    for warning in (*opened.warnings, *tokenizer_notes(words, opened.shape.vocabulary)):
        progress.note(warning)
    inputs = read_pack_inputs(
        profile, buddies, opened.identity, opened.shape, robust=options.robust
    )
    job = plan_pack(options, opened, folder, inputs, tokenizer=tokenizer)
    for note in source_notes(opened, job.spec):
        progress.note(note)
    if options.discard_source:
        if hub is None:
            raise UsageError(
                "--discard-source beside a local folder: only what was downloaded is deleted",
                hint="give a hub id, owner/name, or leave it out",
            )
        discard = DiscardSource(hub, job, opened, offline=offline)
        return write_bundle(job, opened, progress, discard=discard)
    if not job.spec.placed:
        return write_bundle(job, opened, progress)
    in_place = InPlace(folder, opened)
    with closing(in_place.sources):
        return write_bundle(job, opened, progress, in_place=in_place)
