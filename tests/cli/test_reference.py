"""Generated pages and tables say what --help and the plug-ins' specs say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_generated_page_is_stale(script: ModuleType) -> None:
    for path, text in script.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `make docs`"


def test_every_table_is_in_some_page(script: ModuleType) -> None:
    pages = "".join(script.pages().values())
    for name in script.TABLES:
        assert f"<!-- generated: {name} -->" in pages
