"""model.safetensors.index.json: which shard holds which tensor."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.hostile_file import quoted, read_capped
from moe_tool.formats.strict_json import parse_json_object

_MAX_BYTES = 100_000_000
_BASENAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_AGAIN = "copy or download the file again"


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the shard of every tensor that an index names, as plain names of safetensors files.

    Raises:
        CorruptArtifactError: the index is damaged, or names other files.
    """
    text = read_capped(index, limit_bytes=_MAX_BYTES, remedy=_AGAIN)
    weight_map = parse_json_object(index, text, remedy=_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptArtifactError(f"{index} has no weight_map", hint=_AGAIN)
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or not _BASENAME.fullmatch(shard)
            or not shard.endswith(".safetensors")
        ):
            raise CorruptArtifactError(
                f"{index} puts {quoted(name)} into {quoted(shard)}, "
                "which is not the plain name of a safetensors file",
                hint="use a checkpoint from a source that you trust",
            )
    return weight_map


def index_remarks(
    index: Path, weight_map: Mapping[str, str], names: Mapping[str, Collection[str]]
) -> tuple[str, ...]:
    """Return sentences on what the index says otherwise than the shards; the index decides.

    Args:
        index: the file, named in the sentences.
        weight_map: shard by tensor, as the index says.
        names: tensors by shard, as the headers say.
    """
    lacking = [name for name, shard in weight_map.items() if name not in names[shard]]
    extra = [
        (shard, name)
        for shard, held in names.items()
        for name in held
        if weight_map.get(name) != shard
    ]
    remarks = []
    if lacking:
        remarks.append(
            f"{index.name} puts {quoted(lacking[0])}{_and_more(lacking)} into "
            f"{weight_map[lacking[0]]}, which does not hold it"
        )
    if extra:
        shard, name = extra[0]
        remarks.append(
            f"{shard} holds {quoted(name)}{_and_more(extra)}, where {index.name} does not look "
            "for it: not read"
        )
    return tuple(remarks)


def _and_more(found: Sequence[object]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
