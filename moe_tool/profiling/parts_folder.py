"""`<out>.parts/`: the finished layers of a profile, and the arguments that it was begun with."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from moe_tool.errors import UsageError
from moe_tool.formats.atomic_write import atomic_write_bytes
from moe_tool.formats.profile_hdf5 import ProfileHeader
from moe_tool.text.sequences import TokenSequences


class PartsFolder:
    """Folder beside an unfinished profile, from which `--resume` goes on."""

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.parts")

    def open(self, header: ProfileHeader, sequences: TokenSequences, *, resume: bool) -> None:
        """Create the folder; with `resume`, check that an old one had the same arguments."""
        wanted = _fingerprint(header, sequences)
        journal = self.folder / "arguments.json"
        if resume and journal.is_file():
            if journal.read_bytes() != wanted:
                raise UsageError(
                    f"{self.folder} was begun with another model, text, seed or version",
                    hint="repeat the interrupted command with --resume, or begin anew without it",
                )
            return
        self._remove_old(header.identity.quick)
        self.folder.mkdir(parents=True)
        atomic_write_bytes(journal, wanted)

    def _remove_old(self, model: str) -> None:
        """Delete an interrupted profile of the same model; refuse to delete anything else."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise UsageError(
                f"{self.folder} is in the way: it is not a folder", hint="choose another --out"
            )
        if not self.folder.exists():
            return
        held = None
        if any(self.folder.iterdir()) and not (self.folder / "arguments.json").is_file():
            held = "something else than an interrupted profile"
        elif self._model() not in (None, model):
            held = "an interrupted profile of another model"
        if held is not None:
            raise UsageError(
                f"{self.folder} is in the way: it holds {held}",
                hint="choose another --out, or remove it",
            )
        shutil.rmtree(self.folder)

    def _model(self) -> str | None:
        """Return the quick hash of the model in the journal, None if it has none."""
        try:
            kept = json.loads((self.folder / "arguments.json").read_bytes())
            return str(kept["model"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def layer_file(self, layer: int) -> Path:
        """Return the path of a layer's part."""
        return self.folder / f"layer-{layer:05d}.h5"

    def remove(self) -> None:
        """Delete the folder, once the profile is in its place."""
        shutil.rmtree(self.folder)

    def has_layers(self) -> bool:
        """Return whether a layer is finished."""
        return any(self.folder.glob("layer-*.h5"))

    def keep_digests(self, digests: dict[str, str]) -> None:
        """Keep the hashes of the tensors read so far, so that a resume need not read them again."""
        atomic_write_bytes(self.folder / "digests.json", json.dumps(digests).encode())

    def digests(self) -> dict[str, str]:
        """Return the kept hashes by tensor name; none at the beginning."""
        try:
            kept = json.loads((self.folder / "digests.json").read_text())
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}


def _fingerprint(header: ProfileHeader, sequences: TokenSequences) -> bytes:
    ids = hashlib.sha256(np.ascontiguousarray(sequences.ids).tobytes()).hexdigest()
    held_out = hashlib.sha256(sequences.held_out.tobytes()).hexdigest()
    fields = {
        "model": header.identity.quick,
        "tokens": ids,
        "held_out": held_out,
        "sources": list(header.sources),
        "seed": header.seed,
        "tool_version": header.tool_version,
    }
    return json.dumps(fields, indent=1, sort_keys=True).encode()
