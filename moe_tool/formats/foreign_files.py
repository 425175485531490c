"""Errors for files and folders given in place of a checkpoint, recognized by name or beginning."""

import shlex
from pathlib import Path

from moe_tool.errors import CorruptArtifactError, MoeToolError, NotFoundError, UnsupportedModelError

BEGINNING_BYTES = 64
"""Bytes by which a file is recognized"""
_READ = ("model.safetensors", "model.safetensors.index.json")
NO_GGUF = (
    "give a folder that holds it under a name in .gguf, beside config.json, tokenizer.json and "
    "tokenizer_config.json of the model that it was made from"
)


def foreign_content(path: Path, beginning: bytes) -> MoeToolError | None:
    """Return the error for a foreign kind of file, told by its first BEGINNING_BYTES; else None."""
    text = beginning.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return CorruptArtifactError(
            f"{path} is a Git LFS pointer, not the file that it points to",
            hint="git lfs pull in the clone, or download the file itself",
        )
    if text.startswith((b"<!doctype", b"<html")):
        return CorruptArtifactError(
            f"{path} is a web page, not the file",
            hint="download the file itself; a gated model needs hf auth login first",
        )
    if beginning.startswith(b"GGUF"):
        return UnsupportedModelError(f"{path} is a GGUF file", hint=NO_GGUF)
    return None


def foreign_file(path: Path) -> MoeToolError | None:
    """Return the error of `foreign_content` for a file; None if there is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return foreign_content(path, file.read(BEGINNING_BYTES))


def foreign_folder(folder: Path) -> MoeToolError | None:
    """Return the error for a folder whose weights are not stored as a checkpoint's; else None."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError:
        return None
    if not names.isdisjoint(_READ):
        return None
    if "manifest.json" in names and any(name.startswith("skeleton-") for name in names):
        return UnsupportedModelError(
            f"{folder} is a bundle, not the checkpoint that it was packed from",
            hint=f'moe-tool run {shlex.quote(str(folder))} --prompt "The list" runs it; '
            "give the checkpoint to pack and profile",
        )
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        return UnsupportedModelError(
            f"{folder} holds an adapter, not a model",
            hint="merge it into its base model, with peft's merge_and_unload and save_pretrained, "
            "and give the folder of that",
        )
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if weights and all(name.startswith("consolidated") for name in weights):
        return UnsupportedModelError(
            f"{folder} holds the weights only as {weights[0]}, which names tensors in its own way",
            hint="download model.safetensors, or its shards and model.safetensors.index.json",
        )
    if len(weights) == 1:
        return CorruptArtifactError(
            f"{folder} holds {weights[0]}, but no model.safetensors.index.json that names it",
            hint=f"if it is the whole model, call it model.safetensors: "
            f"mv {shlex.quote(str(folder / weights[0]))} {shlex.quote(str(folder / _READ[0]))}; "
            "otherwise download the index and all its shards",
        )
    if weights:
        return CorruptArtifactError(
            f"{folder} holds {len(weights)} safetensors files, but no model.safetensors.index.json "
            "that says what lies where",
            hint="download model.safetensors.index.json of the same checkpoint into the folder",
        )
    if any(name.endswith(".gguf") for name in names):
        return NotFoundError(
            f"{folder} holds its weights as GGUF, but no config.json",
            hint="download config.json, tokenizer.json and tokenizer_config.json of the model that "
            "it was made from into the folder",
        )
    return None
