"""Damaged and foreign hardware profiles are refused by name, and left alone."""

from pathlib import Path

from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.errors import ArtifactVersionError, CorruptArtifactError, NotFoundError
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from tests.formats import samples
from tests.formats.hostile.damage import Case, append, content, cut, json_changed, removed, replaced
from tests.formats.hostile.refusal import cases, require_refusal
from tests.hardware.made_profile import made_profile


def top(name, says, error=CorruptArtifactError, /, **changed):
    damage = json_changed(lambda parsed: parsed.update(changed))
    return Case(name=name, damage=damage, says=says, error=error)


def row(field, name, says, **changed):
    damage = json_changed(lambda parsed: parsed[field][0].update(changed))
    return Case(name=f"{field}: {name}", damage=damage, says=says)


def gpu(name, says, **changed):
    damage = json_changed(lambda parsed: parsed["gpu"].update(changed))
    return Case(name=f"gpu: {name}", damage=damage, says=says)


@cases(
    Case(name="empty file", damage=content(b""), says="damaged"),
    Case(name="cut", damage=cut(200), says="damaged"),
    Case(name="last brace missing", damage=cut(-2), says="damaged"),
    Case(name="two objects", damage=append(b"{}"), says="damaged"),
    Case(name="a list", damage=content(b"[]"), says="not an object"),
    Case(name="nothing there", damage=removed, says="does not exist", error=NotFoundError),
    Case(name="NaN", damage=replaced(b"0.75", b"NaN"), says="NaN"),
    Case(name="infinity", damage=replaced(b"0.75", b"Infinity"), says="Infinity"),
    Case(name="infinity by exponent", damage=replaced(b"0.75", b"1e999"), says="layer_cold_s"),
    Case(name="another digit", damage=replaced(b"0.75", b"0.76"), says="sha256"),
    Case(name="a buddy map", damage=samples.make_buddies, says="a buddy map, not a hardware"),
    top("an unknown kind", "not an artifact of moe-tool", kind="hardwired"),
    top("next version", "'2'", ArtifactVersionError, format_version=2),
    top("unknown key", "extra", extra=1),
    top("unknown source", "source", source="guessed"),
    top("no cores", "cores", cores=0),
    top("cores a fraction", "cores", cores=1.5),
    top("cores true", "cores", cores=True),
    top("memory beyond all machines", "ram_bytes", ram_bytes=2**80),
    top("a name without end", "name", name="x" * 10**6),
    top("no disk", "disk", disk=[]),
    top("disk a number", "disk", disk=1),
    top("no experts", "experts", experts=[]),
    top("no memory", "memory", memory=[]),
    top("a layer in no time", "layer_warm_s", layer_warm_s=0.0),
    top("a layer in less", "layer_cold_s", layer_cold_s=-1.0),
    top("a layer in years", "layer_cold_s", layer_cold_s=1e300),
    top("cold without bytes", "cold_bytes", cold_bytes=0),
    row("disk", "five readers", "disk.0.readers", readers=5),
    row("disk", "no reader", "disk.0.readers", readers=0),
    row("disk", "reads of nothing", "disk.0.read_bytes", read_bytes=0),
    row("disk", "no speed", "disk.0.bytes_per_s", bytes_per_s=0.0),
    row("disk", "a speed that overflows", "disk.0.bytes_per_s", bytes_per_s=1e300),
    row("disk", "unknown pattern", "disk.0.pattern", pattern="zigzag"),
    row("memory", "no threads", "memory.0.threads", threads=0),
    row("memory", "negative speed", "memory.0.bytes_per_s", bytes_per_s=-1e9),
    row("experts", "five bits", "experts.0.bits", bits="5"),
    row("experts", "bits a number", "experts.0.bits", bits=4),
    row("experts", "no tokens", "experts.0.tokens", tokens=0),
    row("experts", "negative time", "experts.0.fixed_s", fixed_s=-1e-9),
    row("experts", "so slow that time is infinite", "bytes_per_s", bytes_per_s=1e-300),
    gpu("no memory", "gpu.memory_bytes", memory_bytes=0),
    gpu("negative link", "gpu.link_bytes_per_s", link_bytes_per_s=-1.0),
    gpu("unknown key", "gpu.cores", cores=1),
)
def test_a_damaged_hardware_profile(tmp_path: Path, case: Case) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    path = folder / "hardware.json"
    write_json_artifact(path, made_profile())
    case.damage(path)
    require_refusal(case, folder, lambda: read_json_artifact(path, HardwareProfile))
