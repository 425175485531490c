"""Refusal of one kind of file or folder where another is wanted, with the way to the right one."""

import shlex
from pathlib import Path
from typing import Literal

from moe_tool.artifacts.model_names import model_to_type
from moe_tool.errors import (
    CorruptArtifactError,
    MoeToolError,
    NotFoundError,
    UnsupportedModelError,
)
from moe_tool.formats.foreign_files import NO_GGUF, foreign_file
from moe_tool.formats.given_kind import Given, Kind, begins_like, kind_of

Wanted = Literal["profile", "buddies", "plan", "hardware", "bundle", "model", "text"]
_OWN_COMPLAINTS: dict[Wanted, tuple[Kind, ...]] = {
    "profile": ("profile", "run-trace", "hdf5", "unknown"),
    "buddies": ("buddies", "unknown"),
    "plan": ("plan", "unknown"),
    "hardware": ("hardware", "unknown"),
    "bundle": ("bundle", "half-bundle"),
    "model": ("model", "missing"),
    "text": ("text", "json", "folder", "empty-folder", "empty-file", "missing", "unknown"),
}
"""Kinds that readers of the wanted one take, or refuse in better words"""
_WANTED_LABELS: dict[Wanted, str] = {
    "profile": "a profile",
    "buddies": "a buddy map",
    "plan": "a plan",
    "hardware": "a hardware profile",
    "bundle": "a bundle",
    "model": "the folder of a checkpoint",
    "text": "text",
}
LOOKUP_HINT = (
    "its experts are rows of a table, so that there are none to keep or to answer for: only "
    "moe-tool run, evaluate, bench and inspect take it"
)


def require_kind(path: Path, wanted: Wanted) -> None:
    """Refuse a path at which something else lies than what is wanted.

    What only its reader can judge, a damaged file of the right kind for one, passes.

    Raises:
        NotFoundError: nothing lies there.
        CorruptArtifactError, UnsupportedModelError: something else does.
    """
    if begins_like(path, "hdf5" if wanted == "profile" else "json") and wanted != "text":
        return  # its reader is about to read it through
    given = kind_of(path)
    if given.kind not in _OWN_COMPLAINTS[wanted]:
        raise wrong_kind(path, given, wanted)


def wrong_kind(path: Path, given: Given, wanted: Wanted) -> MoeToolError:
    """Return the error for something at a path that is not what is wanted there."""
    label = _WANTED_LABELS[wanted]
    if given.kind == "missing":
        return NotFoundError(f"{path} does not exist, {label} is wanted", hint=_making(wanted))
    if given.kind != "gguf" and (foreign := foreign_file(path)) is not None:
        return foreign
    kind = UnsupportedModelError if given.kind == "gguf" else CorruptArtifactError
    return kind(f"{path} is {given.label}, not {label}", hint=_hint(path, given, wanted))


def _hint(path: Path, given: Given, wanted: Wanted) -> str:
    """Return what to type instead: by what was given, else how the wanted thing is made."""
    typed = shlex.quote(str(path))
    model = None if given.model is None else shlex.quote(model_to_type(given.model))
    if wanted == "text":
        return "give a UTF-8 text file or a folder of them; --data builtin needs no file"
    if wanted == "bundle":
        return _hint_of_bundle(path, given, model or "demo")
    if wanted == "model":
        return _hint_of_model(path, given, model)
    if given.kind == "profile":
        making = {"buddies": f"moe-tool buddies {typed}", "plan": f"moe-tool plan {typed}"}
        if wanted in making:
            more = " --memory 50%" if wanted == "plan" else ""
            return f"{making[wanted]}{more} makes one of this profile"
    if wanted == "profile":
        made_from = {
            "model": f"moe-tool profile {typed} --data builtin",
            "text": f"moe-tool profile demo --data {typed}",
            "lookup-bundle": "",
        }
        made = made_from.get(given.kind, f"moe-tool profile {model or 'demo'} --data builtin")
        return f"{made} records one" if made else LOOKUP_HINT
    if given.kind in ("plan", "buddies") and wanted in ("plan", "buddies"):
        return f"it goes after --{given.kind}; {_making(wanted)}"
    return _making(wanted)


def _hint_of_bundle(path: Path, given: Given, model: str) -> str:
    typed, folder = shlex.quote(str(path)), shlex.quote(str(path.parent))
    if given.kind in ("manifest", "weights") and kind_of(path.parent).kind in (
        *("bundle", "lookup-bundle"),
    ):
        return f"give the folder that it lies in: {folder}"
    special = {
        "lookup-bundle": LOOKUP_HINT,
        "gguf": NO_GGUF,
        "model": f"moe-tool pack {typed} --out bundle/ makes one of it",
        "run-trace": f"moe-tool simulate {typed} reads it",
        "hardware": f"moe-tool plan --memory 50% --hardware {typed} takes it",
        "headless-bundle": "remove the folder and pack the bundle again with moe-tool pack",
    }
    if given.kind in special:
        return special[given.kind]
    if given.kind in ("profile", "buddies", "plan"):
        return f"moe-tool pack {model} --{given.kind} {typed} --out bundle/ makes one with it"
    return _making("bundle")


def _hint_of_model(path: Path, given: Given, model: str | None) -> str:
    typed, folder = shlex.quote(str(path)), shlex.quote(str(path.parent))
    if given.kind in ("weights", "text", "gguf") and kind_of(path.parent).kind == "model":
        return f"give the folder that it lies in: {folder}"
    special = {
        "gguf": NO_GGUF,
        "half-bundle": "the command that began it, moe-tool pack or tune weights, goes on with it",
    }
    if given.kind in special:
        return special[given.kind]
    if given.kind in ("bundle", "lookup-bundle"):
        run = f'moe-tool run {typed} --prompt "The list" runs it'
        return run + (f"; it was packed from {model}" if model else "")
    if model is not None:
        return f"it was made from {model}: give that"
    return _making("model")


def _making(wanted: Wanted) -> str:
    """Return how the wanted thing is made or found."""
    return {
        "profile": "moe-tool profile demo --data builtin records one of the embedded model",
        "buddies": "moe-tool buddies makes one of the newest profile",
        "plan": "moe-tool plan --memory 50% makes one of the newest profile",
        "hardware": "moe-tool hardware measures this machine; moe-tool hardware --shipped "
        "laptop-16gb takes a data sheet's figures",
        "bundle": "moe-tool pack demo --out bundle/ makes one of the embedded model",
        "model": "give a folder with config.json and the weights, a hub id (owner/name), or demo "
        "for the embedded model",
        "text": "give a UTF-8 text file or a folder of them; --data builtin needs no file",
    }[wanted]
