"""Identity of a checkpoint, computed at every start, that tells fine-tunes apart."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.formats.safetensors_index import Checkpoint

# Keys that depend on who saved the file last, not on the weights.
_VOLATILE_CONFIG_KEYS = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})


def checkpoint_identity(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    name: str,
    model_type: str,
    hashed_tensors: Sequence[str],
) -> ModelIdentity:
    """Return the quick identity of a checkpoint.

    Args:
        folder: holds config.json.
        checkpoint: its tensors; only those in `hashed_tensors` are read.
        name: the user's name for the model.
        model_type: transformers' model type.
        hashed_tensors: on-disk names of routers and norms, the small tensors that every fine-tune
            changes.

    Raises:
        CorruptArtifactError: a tensor cannot be read.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    digest.update(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
    for tensor_name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[tensor_name]
        digest.update(f"\n{tensor_name} {info.dtype} {list(info.shape)}".encode())
    for tensor_name in sorted(hashed_tensors):
        digest.update(f"\n{tensor_name}\n".encode())
        digest.update(checkpoint.read_bytes(tensor_name))
    return ModelIdentity(name=name, model_type=model_type, quick=digest.hexdigest())
