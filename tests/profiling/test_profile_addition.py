"""A widened profile equals one that was recorded at once over the same sequences."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.errors import NotFoundError, UsageError, WrongModelError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling import profile_addition, recorder
from moe_tool.profiling.hidden_states import HiddenStates
from moe_tool.profiling.merged_statistics import merge_statistics
from moe_tool.profiling.profile_addition import add_to_profile
from moe_tool.profiling.recorder import ProfileReport, record_profile
from moe_tool.text.sequences import TokenSequences
from moe_tool.text.sources import parse_sources

MEMORY = 8 * 2**30


def record(folder: Path, out: Path, source: str) -> None:
    record_profile(
        LocatedModel(folder=folder, name="tiny"),
        parse_sources([source]),
        out=out,
        tokens=512,
        seq_len=32,
        memory_bytes=MEMORY,
    )


def add(folder: Path, out: Path, source: str, *, resume: bool = False) -> ProfileReport:
    return add_to_profile(
        LocatedModel(folder=folder, name="tiny"),
        parse_sources([source]),
        out=out,
        tokens=256,
        memory_bytes=MEMORY,
        resume=resume,
    )


@pytest.mark.parametrize("name", ["code", "docs"])
def test_widened_profile_equals_the_one_recorded_at_once(
    name: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, out = tiny_checkpoint("qwen3_moe"), tmp_path / "p.h5"
    record(folder, out, "builtin:docs")
    parts: list[list[ExpertStatistics]] = []
    merge = merge_statistics

    def noting(old: ExpertStatistics, new: ExpertStatistics, **others: object) -> ExpertStatistics:
        parts.append([old, new])
        return merge(old, new, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(profile_addition, "merge_statistics", noting)
    report = add(folder, out, f"{name}=builtin:code")
    assert report.added is not None
    assert (report.added.tokens, report.tokens) == (256, 768)
    assert report.domains == (("docs", "code") if name == "code" else ("docs",))
    assert not (tmp_path / "p.h5.add.parts").exists()
    with ProfileReader.open(out) as merged:
        tokens, sources = merged.tokens, merged.header.sources
    assert sources == ("docs=builtin:docs", f"{name}=builtin:code")
    whole = TokenSequences(
        **{field.name: getattr(tokens, field.name) for field in fields(tokens)},
        sources=sources,
        seed=0,
    )
    monkeypatch.setattr(recorder, "build_sequences", lambda *_, **__: whole)
    record(folder, tmp_path / "whole.h5", "builtin:docs")
    with ProfileReader.open(out) as merged, ProfileReader.open(tmp_path / "whole.h5") as once:
        assert merged.header == once.header
        for layer, measured in zip(once.layers, parts, strict=True):
            found, wanted = merged.trace(layer), once.trace(layer)
            for field in fields(wanted):
                np.testing.assert_array_equal(
                    getattr(found, field.name), getattr(wanted, field.name)
                )
            _assert_same_statistics(merged.statistics(layer), once.statistics(layer), measured)


def _assert_same_statistics(
    found: ExpertStatistics, wanted: ExpertStatistics, parts: list[ExpertStatistics]
) -> None:
    """All tokens are probed (768 of at most 1024), so that even scales agree, of experts with
    enough tokens in both parts; CKA is no sum, and sensitivities are of other samples."""
    for part in ("in_sample", "held_out"):
        _assert_close(getattr(found, part), getattr(wanted, part))
    routed = {
        name: ~(getattr(parts[0], name).fell_back | getattr(parts[1], name).fell_back)
        for name in ("probe", "probe_held_out")
    }
    for name, rows in routed.items():
        assert rows.sum() >= 3
        _assert_close(getattr(found, name), getattr(wanted, name), rows)
        # A scale near 0 hides the other expert's energy: only its price is sure, as above.
        told = np.logical_and(*(1 - getattr(part, name).eps_buddy ** 2 > 1e-4 for part in parts))
        told &= rows[:, None]
        assert told.sum() > len(rows)
        _close(getattr(found, name).scale[told], getattr(wanted, name).scale[told], "scale")
    both = routed["probe"] & routed["probe_held_out"]
    _close(found.eps_buddy_transferred[both], wanted.eps_buddy_transferred[both], "transferred")
    same = routed["probe"] & (found.eps_bits_n_tokens == wanted.eps_bits_n_tokens)
    assert same.any()
    _close(found.eps_bits[same], wanted.eps_bits[same], "eps_bits")
    np.testing.assert_array_equal(found.router_similarity, wanted.router_similarity)
    tokens = [part.sensitivity_n_tokens for part in parts]
    mean = np.average([part.sensitivity for part in parts], weights=tokens)
    assert found.sensitivity == pytest.approx(mean)
    assert found.sensitivity_n_tokens == sum(tokens)


def _assert_close(found: object, wanted: object, rows: np.ndarray | None = None) -> None:
    for field in fields(wanted):  # type: ignore[arg-type]
        have, want = getattr(found, field.name), getattr(wanted, field.name)
        if field.name in ("cka", "n_cka", "scale"):
            continue
        if rows is not None and np.ndim(want):
            have, want = have[rows], want[rows]
        _close(have, want, field.name)


def _close(found: Any, wanted: Any, name: str) -> None:
    if np.asarray(wanted).dtype.kind in "ib":
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3, err_msg=name)
    assert np.median(np.abs(np.asarray(found, float) - wanted)) < 1e-4


def test_interrupted_addition_leaves_the_profile_and_resumes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, whole = tiny_checkpoint("olmoe"), tmp_path / "p.h5", tmp_path / "w.h5"
    record(folder, out, "builtin:docs")
    before = out.read_bytes()
    whole.write_bytes(before)
    add(folder, whole, "builtin:code")
    commit = HiddenStates.commit

    def killing(self: HiddenStates, next_layer: int) -> None:
        commit(self, next_layer)
        if next_layer == 1:
            raise KeyboardInterrupt

    def failing(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "commit", killing)
        with pytest.raises(KeyboardInterrupt):
            add(folder, out, "builtin:code")
    assert out.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(profile_addition, "merge_statistics", failing)
        with pytest.raises(KeyboardInterrupt):
            add(folder, out, "builtin:code", resume=True)
    assert out.read_bytes() == before
    add(folder, out, "builtin:code", resume=True)
    assert out.read_bytes() == whole.read_bytes()


def test_wrong_profiles_and_known_text_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = tiny_checkpoint("olmoe"), tmp_path / "p.h5"
    with pytest.raises(NotFoundError):
        add(folder, out, "builtin:code")
    record(folder, out, "builtin:docs")
    before = out.read_bytes()
    for source in ("docs=builtin:docs", "other=builtin:docs"):
        with pytest.raises(UsageError, match=f"has the text {source} already"):
            add(folder, out, source)
    with pytest.raises(WrongModelError):
        add(tiny_checkpoint("mixtral"), out, "builtin:code")
    assert out.read_bytes() == before
