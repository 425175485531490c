"""Facts of a lookup bundle: shape, form and size of its rows."""

from pathlib import Path

from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.inspection.description import Description, model_facts
from moe_tool.progress import Progress


def describe_lookup(path: Path, *, verify: bool, progress: Progress) -> Description:
    """Describe a bundle whose experts are rows of a table.

    Raises:
        CorruptArtifactError, ArtifactVersionError: it is damaged, or has another format version.
    """
    bundle = LookupBundle.open(path)
    if verify:
        progress.begin("check every hash", None, "")
        rows = bundle.open_rows()
        try:
            rows.verify()
        finally:
            rows.close()
        with bundle.open_skeleton() as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
        progress.end()
    manifest = bundle.manifest
    facts: dict[str, object] = {
        "vocabulary": manifest.vocabulary,
        "layers": manifest.layers,
        "experts": manifest.experts,
        "hidden": manifest.hidden,
        "rows": manifest.form,
        "row_bytes": manifest.row_bytes,
        "table_bytes": manifest.table_bytes,
        "bytes": sum(file.size_bytes for file in manifest.files),
        "tool_version": manifest.tool_version,
    }
    return Description(
        kind="lookup bundle",
        path=path,
        checked="every hash" if verify else "sizes and headers",
        facts=model_facts(manifest.identity) | facts,
    )
