"""Packs a model as the command line does: options are words."""

from pathlib import Path
from typing import Any

from moe_tool.models.locate import LocatedModel
from moe_tool.packing import pack_bundle as packing
from moe_tool.packing.pack_options import parse_pack_options
from moe_tool.packing.write_bundle import PackReport


def pack_bundle(
    model: LocatedModel, *, profile: Path | None = None, buddies: Path | None = None, **options: Any
) -> PackReport:
    """Pack a model; `options` are those of `parse_pack_options`."""
    parsed = parse_pack_options(**options)
    return packing.pack_bundle(model, parsed, profile=profile, buddies=buddies)
