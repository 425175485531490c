"""Facts on the skeleton of an opened checkpoint, from its headers alone."""

from collections import Counter
from pathlib import Path

from pydantic import ValidationError

from moe_tool.artifacts.skeleton_facts import LinearCount, SkeletonFacts, TablesOnDisk
from moe_tool.budget.table_choice import AUTO_ROWS
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.strict_json import first_complaint
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.model_config import read_config_text
from moe_tool.models.skeleton_loader import SkeletonLoader


def skeleton_facts(opened: OpenedModel, folder: Path) -> SkeletonFacts:
    """Return the facts of a model without reading tensors.

    Args:
        opened: the model.
        folder: holds its config.json.

    Raises:
        NotFoundError, CorruptArtifactError: config.json is missing or too large.
    """
    tensors, source = opened.checkpoint.tensors, opened.skeleton
    loader = SkeletonLoader(folder, opened.checkpoint)
    coded = loader.kept_bytes
    sizes = {name: coded.get(name, tensors[name].size_bytes) for name in source.tensor_names}
    kept = set(source.other_names)
    found: Counter[tuple[int, int]] = Counter()
    tied_weights = 0
    for group in source.groups:
        stays = any(name in kept for name in source.group_names(group))
        for parameter in group.made_as:
            n_outputs, n_inputs = source.shapes[parameter]
            found[n_outputs, n_inputs] += 1
            tied_weights += n_outputs * n_inputs if stays else 0
    try:
        return SkeletonFacts(
            native_bytes=sum(sizes.values()),
            linear_native_bytes=sum(size for name, size in sizes.items() if name not in kept),
            largest_tensor_bytes=max(sizes.values(), default=0),
            linears=tuple(
                LinearCount(n_outputs=n_outputs, n_inputs=n_inputs, count=count)
                for (n_outputs, n_inputs), count in sorted(found.items())
            ),
            tied_head_weights=tied_weights,
            held_bytes=loader.held_bytes,
            reading_bytes=loader.largest_bytes,
            tables_on_disk=_tables_on_disk(loader),
            config_json=read_config_text(folder),
        )
    except ValidationError as error:
        raise CorruptArtifactError(
            f"{folder / 'config.json'} does not describe a model: {first_complaint(error)}",
            hint="download the checkpoint again",
        ) from error


def _tables_on_disk(loader: SkeletonLoader) -> TablesOnDisk | None:
    sizes = {name: table.held_bytes for name, table in loader.tables.items()}
    chosen = AUTO_ROWS.choose(sizes)
    if not chosen:
        return None
    return TablesOnDisk(
        held_bytes=sum(sizes[name] for name in chosen),
        reading_bytes=loader.largest_without(chosen),
    )
