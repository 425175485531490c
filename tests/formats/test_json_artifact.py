"""JSON artifacts: what was written comes back, the same artifact gives the same bytes."""

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.buddy_map import Buddy, BuddyMap, LayerBuddies, Similarity
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.errors import CorruptArtifactError, StorageError
from moe_tool.formats import json_artifact
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.json_artifact import read_json_artifact, write_json_artifact
from tests.formats import samples

FINITE = st.floats(allow_nan=False, allow_infinity=False)
PRICE = st.floats(0, 1e300)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)


@st.composite
def buddy_maps(draw: st.DrawFn) -> BuddyMap:
    n_experts = draw(st.integers(1, 4))

    def stand_ins(expert: int) -> tuple[Buddy, ...]:
        others = [other for other in range(n_experts) if other != expert]
        chosen = draw(st.lists(st.sampled_from(others), unique=True)) if others else []
        return tuple(
            Buddy(
                expert=other,
                similarity=draw(FINITE),
                scale=draw(FINITE),
                price=draw(PRICE),
                price_held_out=draw(PRICE),
            )
            for other in chosen
        )

    layers = tuple(
        LayerBuddies(
            layer=layer,
            entropy_threshold=draw(st.floats(0, 1)),
            buddies=tuple(stand_ins(expert) for expert in range(n_experts)),
            clusters=tuple(range(n_experts)),
        )
        for layer in range(draw(st.integers(0, 2)))
    )
    return BuddyMap(
        tool_version=draw(TEXT),
        identity=ModelIdentity(
            name=draw(TEXT),
            model_type=draw(TEXT),
            quick=draw(DIGEST),
            full=draw(st.none() | DIGEST),
        ),
        profile_sha256=draw(DIGEST),
        by=draw(st.sampled_from(get_args(Similarity))),
        k=draw(st.integers(1, 2**31)),
        layers=layers,
    )


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(wanted=buddy_maps())
def test_a_buddy_map_comes_back(tmp_path: Path, wanted: BuddyMap) -> None:
    path = tmp_path / "map.json"
    write_json_artifact(path, wanted)
    first = path.read_bytes()
    found = read_json_artifact(path, BuddyMap)
    assert found == wanted
    write_json_artifact(path, found)
    assert path.read_bytes() == first


def test_a_file_beyond_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = samples.make_buddies(tmp_path / "map.json")
    monkeypatch.setattr(json_artifact, "MAX_BYTES", 100)
    with pytest.raises(CorruptArtifactError, match="wanted at most 100"):
        read_json_artifact(path, BuddyMap)


def test_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def refuse(path: object, *_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", path)

    path = samples.make_buddies(tmp_path / "map.json")
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(StorageError, match="map.json: Permission denied"):
            read_json_artifact(path, BuddyMap)


def test_quoted_text_stays_on_one_line_and_short() -> None:
    assert quoted("a\n\x1b[31mé") == r"'a\n\x1b[31m\xe9'"
    assert quoted("x" * 200) == "'" + "x" * 120 + "'..."
    assert quoted("\ud800") == r"'\ud800'"
