"""Packs a model as the command line does: options are words."""

from pathlib import Path
from typing import Any

from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.packing import pack_bundle as packing
from moe_tool.packing.pack_options import parse_pack_options
from moe_tool.packing.write_bundle import PackReport
from moe_tool.progress import SILENT, Progress


def pack_bundle(
    model: LocatedModel,
    *,
    profile: Path | None = None,
    buddies: Path | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> PackReport:
    """Pack a model; `options` are those of `parse_pack_options`."""
    parsed = parse_pack_options(**options)
    opened = open_model(model)
    with opened.checkpoint:
        return packing.pack_bundle(
            opened, model.folder, parsed, profile=profile, buddies=buddies, progress=progress
        )
