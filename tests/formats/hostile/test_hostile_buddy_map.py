"""Damaged and foreign buddy maps are refused by name, and left alone."""

from pathlib import Path

from moe_tool.artifacts.buddy_map import BuddyMap
from moe_tool.errors import ArtifactVersionError, CorruptArtifactError, NotFoundError
from moe_tool.formats.json_artifact import read_json_artifact
from tests.formats import samples
from tests.formats.hostile.damage import (
    Case,
    append,
    content,
    cut,
    flip,
    folder_instead,
    json_changed,
    pipe_instead,
    removed,
    replaced,
)
from tests.formats.hostile.refusal import cases, require_refusal


def top(name, says, error=CorruptArtifactError, **changed):
    damage = json_changed(lambda parsed: parsed.update(changed))
    return Case(name=name, damage=damage, says=says, error=error)


def layer(name, says, **changed):
    damage = json_changed(lambda parsed: parsed["layers"][0].update(changed))
    return Case(name=name, damage=damage, says=says)


def buddy(name, says, **changed):
    damage = json_changed(lambda parsed: parsed["layers"][0]["buddies"][1][0].update(changed))
    return Case(name=name, damage=damage, says=says)


@cases(
    Case(name="empty file", damage=content(b""), says="damaged"),
    Case(name="cut", damage=cut(100), says="damaged"),
    Case(name="last brace missing", damage=cut(-2), says="damaged"),
    Case(name="two objects", damage=append(b"{}"), says="damaged"),
    Case(name="not UTF-8", damage=flip(0), says="damaged"),
    Case(name="byte order mark", damage=content(b"\xef\xbb\xbf{}"), says="damaged"),
    Case(name="a list", damage=content(b"[]"), says="not an object"),
    Case(name="a million brackets", damage=content(b"[" * 10**6), says="nest"),
    Case(
        name="a million objects",
        damage=content(b'{"a":' * 10**6 + b"0" + b"}" * 10**6),
        says="nest",
    ),
    Case(name="folder", damage=folder_instead, says="is an empty folder, not a buddy map"),
    Case(name="pipe", damage=pipe_instead, says="not a file"),
    Case(name="nothing there", damage=removed, says="does not exist", error=NotFoundError),
    Case(
        name="key twice", damage=replaced(b'"k": 1,', b'"k": 1, "k": 1,'), says="'k' occurs twice"
    ),
    Case(name="NaN", damage=replaced(b"0.25", b"NaN"), says="NaN"),
    Case(name="infinity", damage=replaced(b"0.25", b"-Infinity"), says="Infinity"),
    Case(name="infinity by exponent", damage=replaced(b"0.25", b"1e999"), says="price"),
    Case(
        name="number of 5000 digits",
        damage=replaced(b'"k": 1', b'"k": 1' + b"0" * 5000),
        says="digits",
    ),
    Case(name="another digit", damage=replaced(b"0.25", b"0.26"), says="sha256"),
    Case(name="another hash", damage=flip(-6), says="damaged"),
    top("k of 20 digits", "k:", k=10**20),
    top("k zero", "k:", k=0),
    top("k true", "k:", k=True),
    top("k text", "k:", k="1"),
    top("another kind", "the manifest of a bundle, not a buddy map", kind="bundle"),
    top("an unknown kind", "not an artifact of moe-tool", kind="x\n\x1b[31m"),
    top("kind a list", "not an artifact of moe-tool", kind=["buddies"]),
    top("next version", "'2'", ArtifactVersionError, format_version=2),
    top("version true", "'True'", ArtifactVersionError, format_version=True),
    top("version missing", "'None'", ArtifactVersionError, format_version=None),
    top("unknown key", "extra", extra=1),
    top("unknown key with terminal codes", "x1b", **{"a\n\x1b[31m": 1}),
    top("unknown measure", "by", by="magic"),
    top("hash too short", "profile_sha256", profile_sha256="3" * 63),
    top("no identity", "identity", identity=None),
    layer("negative layer", "layers.0.layer", layer=-1),
    layer("threshold above one", "entropy_threshold", entropy_threshold=1.5),
    layer("too few clusters", "differ in length", clusters=[0]),
    buddy("own stand-in", "lists itself", expert=1),
    buddy("stand-in that does not exist", "does not exist", expert=3),
    buddy("stand-in a fraction", "expert", expert=0.5),
    buddy("negative price", "price", price=-1.0),
)
def test_a_damaged_buddy_map(tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    path = samples.make_buddies(folder / "tiny.buddies.json")
    case.damage(path)
    require_refusal(case, folder, lambda: read_json_artifact(path, BuddyMap))
