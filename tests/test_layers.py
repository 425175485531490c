"""No module imports one that stands above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moe_tool"

LEAVES = {"allocator", "errors", "kept_work", "progress", "available_memory", "artifact_folder"}
LOWEST = {"budget", "artifacts"}
# Room -> the rooms right below it; what those may import, it may too.
BELOW = {
    "budget": {"errors"},
    "artifacts": {"errors", "budget"},
    "text": {"artifacts"},
    "formats": {"artifacts", "quantization", "policies", "native", "quantizers"},
    "quantization": {"artifacts"},
    "quantizers": {"experts", "native", "quantization"},
    "policies": {"artifacts"},
    "reports": {"artifacts"},
    "buddies": {"artifacts", "formats"},
    "models": {"formats", "experts"},
    "store": {"formats"},
    "native": {"quantization"},
    "experts": {"native", "quantization"},
    "profiling": {"models", "text", "experts", "quantization", "formats"},
    "packing": {"models", "experts", "quantization", "quantizers", "formats"},
    "runtime": {"models", "store", "experts", "native", "policies"},
    "simulator": {"formats", "policies", "native"},
    "lookup": {"runtime", "packing", "models", "formats", "quantization"},
    "planning": {"simulator", "runtime", "models"},
    "evaluation": {"runtime", "text", "models", "lookup"},
    "tuning": {"evaluation", "packing", "text"},
    "hardware": {"models", "store", "experts", "native", "quantization", "formats"},
    "benchmarking": {"runtime", "text", "models", "lookup"},
    "inspection": {"profiling", "models", "formats"},
}
# A file that reads what another room writes, where the arrow between the rooms is not wanted.
ALSO_ALLOWED = {
    ("text", "formats"),  # asks formats.hub_probe before the network
}
EVERYTHING = {"cli", "demo", "__main__", "__init__"}


def allowed_rooms(room: str) -> set[str]:
    below: set[str] = set()
    waiting = [room]
    while waiting:
        for lower in BELOW.get(waiting.pop(), set()):
            if lower not in below:
                below.add(lower)
                waiting.append(lower)
    leaves = set() if room in LEAVES | LOWEST else LEAVES
    return below | leaves | {room}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """Every module of the package that a file imports anywhere, lazily or for types alone too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            if module == "moe_tool":  # its rooms; what it defines itself is for everybody
                names = [alias.name for alias in node.names if not alias.name.startswith("__")]
                found += [(node.lineno, f"moe_tool.{name}") for name in names]
            else:
                found.append((node.lineno, module))
    return [(line, name) for line, name in found if name.split(".")[0] == "moe_tool"]


def upward_imports(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        module = "moe_tool." + ".".join(path.relative_to(package).with_suffix("").parts)
        room = room_of(module)
        if room in EVERYTHING:
            continue
        for line, imported in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            target = room_of(imported)
            if target not in allowed_rooms(room) and (room, target) not in ALSO_ALLOWED:
                wrong.append(f"{path.relative_to(package)}:{line} imports {imported}")
    return wrong


def test_no_module_imports_what_stands_above_it() -> None:
    assert upward_imports(PACKAGE) == []


def strange_folders(package: Path) -> list[str]:
    """Say which folders with code have no `__init__.py`, and which rooms no place in BELOW."""
    folders = {path.parent for path in package.rglob("*.py")}
    wrong = [
        f"{folder.relative_to(package)} has no __init__.py"
        for folder in sorted(folders)
        if not (folder / "__init__.py").is_file()
    ]
    rooms = {folder.name for folder in folders if folder.parent == package}
    return wrong + [f"{room} has no place" for room in sorted(rooms - set(BELOW) - EVERYTHING)]


def test_every_folder_has_its_place() -> None:
    assert strange_folders(PACKAGE) == []


def test_a_strange_folder_is_found(tmp_path: Path) -> None:
    for file in ("__init__.py", "store/__init__.py", "attic/slots.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    assert strange_folders(tmp_path) == ["attic has no __init__.py", "attic has no place"]


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("formats/reader.py", "from moe_tool.runtime.session import Session\n", True),
        ("errors.py", "from moe_tool import budget\n", True),
        ("store/slots.py", "def f():\n    import moe_tool.runtime.session\n", True),
        ("store/slots.py", "from moe_tool.artifacts.identity import ModelIdentity\n", False),
        ("runtime/session.py", "import torch\nfrom moe_tool.formats import bundle_reader\n", False),
        ("cli/run.py", "from moe_tool.evaluation import evaluate\n", False),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, file: str, text: str, wrong: bool) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert bool(upward_imports(tmp_path)) == wrong
