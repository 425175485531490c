"""Verdicts on running text, however its tokens come."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.inspection.describe_artifact import describe_artifact
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.drift_watch import DriftWatch
from moe_tool.runtime.generation import generate
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import parse_sources
from tests.formats.hostile.damage import json_changed
from tests.made_norms import make_norm
from tests.packed import pack_bundle


def feed(
    watch: DriftWatch,
    tokens: torch.Tensor,
    *,
    is_first: bool = False,
    mask: torch.Tensor | None = None,
) -> str | None:
    """Give tokens [B, n, 2] of which the norm watches value 0 in layer 1 and value 1 in layer 3."""
    n_sequences, n_new = tokens.shape[:2]
    watch.begin_forward(n_sequences, n_new, mask=mask, is_first=is_first)
    flat = tokens.reshape(-1, 2)
    other = torch.full((len(flat), 1), 1e9)
    watch.add(1, flat[:, :1])
    watch.add(3, torch.cat([other, other, flat[:, 1:]], dim=1))
    return watch.end_forward()


def text(*parts: tuple[int, float]) -> torch.Tensor:
    """Tokens [1, n, 2]: runs of (length, second value); the first value is 0."""
    second = torch.cat([torch.full((length,), value) for length, value in parts])
    return torch.stack([torch.zeros(len(second)), second], dim=-1)[None]


def test_windows_are_scored_by_halves() -> None:
    # A mean of a in the second value scores a^2 / 0.5 / 2 = a^2, over thresholds of 3 and 2.
    watch = DriftWatch(make_norm())
    assert feed(watch, text((31, 1.5)), is_first=True) is None
    assert watch.windows == 0 and watch.score.tolist() == [0.0]
    assert feed(watch, text((1, 1.5))) is None
    assert watch.score.tolist() == [2.25 / 3] and not watch.is_drifting
    note = feed(watch, text((32, 1.5)))
    assert watch.score.tolist() == [2.25 / 2] and watch.is_drifting
    assert note is not None and "wiki, code" in note and "64 tokens" in note
    assert feed(watch, text((64, 1.5))) is None, "noted once"
    seen = watch.seen()
    assert (seen.windows, seen.alarms, seen.first_alarm_tokens) == (2, 2, 64)


def test_drift_ends_with_a_whole_window_of_the_profiles_kind() -> None:
    watch = DriftWatch(make_norm())
    feed(watch, text((32, 4.0)), is_first=True)
    assert watch.is_drifting and watch.first_at == 32
    feed(watch, text((95, 0.0)))  # the window of the alarm ends with a mean of 2: above as well
    assert watch.is_drifting
    feed(watch, text((1, 0.0)))
    assert not watch.is_drifting and watch.alarms == 1


def test_another_sequence_begins_anew() -> None:
    watch = DriftWatch(make_norm())
    feed(watch, text((40, 9.0)), is_first=True)
    assert watch.is_drifting
    assert feed(watch, text((40, 0.0)), is_first=True) is None
    assert not watch.is_drifting and watch.tokens.tolist() == [40]
    assert watch.seen().first_alarm_tokens is None and watch.windows == 1


@pytest.mark.parametrize("sizes", [[150], [1] * 150, [33, 1, 62, 54], [5, 64, 64, 17]])
def test_chunks_and_batches_give_the_same_verdicts(sizes: list[int]) -> None:
    rng = np.random.default_rng(3)
    rows = torch.from_numpy(rng.normal(size=(3, 150, 2)).astype(np.float32) * 3)
    rows[1, :, 1] += 2
    rows[2, 100:, 1] += 4
    together = DriftWatch(make_norm())
    position = 0
    for size in sizes:
        feed(together, rows[:, position : position + size], is_first=position == 0)
        position += size
    singles = []
    for row in rows:
        watch = DriftWatch(make_norm())
        feed(watch, row[None], is_first=True)
        singles.append(watch)
    assert together.score.tolist() == [float(watch.score[0]) for watch in singles]
    assert together.drifting.tolist() == [watch.is_drifting for watch in singles]
    assert together.alarms == sum(watch.alarms for watch in singles) > 0
    assert together.drifting.tolist()[:2] == [False, True]


def test_padding_is_not_judged() -> None:
    rows = torch.cat([text((40, 9.0)), text((20, 9.0), (20, 0.0))])
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :20] = 0
    watch = DriftWatch(make_norm())
    feed(watch, rows, is_first=True, mask=mask)
    assert watch.tokens.tolist() == [40, 20] and watch.drifting.tolist() == [True, False]
    feed(watch, torch.cat([text((12, 0.0))] * 2), mask=torch.ones(2, 52))
    assert watch.tokens.tolist() == [52, 32] and watch.score[1] == 0.0 and watch.windows == 2


def test_a_router_that_was_not_seen_gives_no_verdict() -> None:
    watch = DriftWatch(make_norm())
    watch.begin_forward(1, 64, is_first=True)
    watch.add(1, torch.full((64, 1), 1e4))
    assert watch.end_forward() is None and watch.tokens.tolist() == [0]


class _Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="mixtral")
    profile = folder / "tiny.h5"
    record_profile(model, parse_sources(["builtin"]), out=profile, tokens=9216, seq_len=128)
    pack_bundle(model, out=folder / "bundle", profile=profile)
    return folder / "bundle"


def test_a_session_watches_its_text(bundle: Path) -> None:
    listener = _Notes()
    with open_session(bundle, run_options(context=256, threads=1), progress=listener) as session:
        watch = session.runner.watch
        assert watch is not None and session.manifest.routing_norm is not None
        options = GenerateOptions(max_tokens=70, ignore_eos=True, raw=True)
        first = generate(session, "The list", options)
        assert first.drift is not None
        # The last token is chosen, not fed.
        assert watch.tokens.tolist() == [first.prompt.tokens + first.generated_tokens - 1]
        assert generate(session, "The list", options).drift == first.drift
        # Routers whose outputs are far from any profile are noticed, and said once.
        for layer in session.skeleton.layers:
            with torch.no_grad():
                layer.router.weight.mul_(-3)
        assert generate(session, "The list", options).drift != first.drift
        changed = watch.seen()
        assert changed.alarms and changed.is_drifting
        generate(session, "The list", options)
    assert sum("routed unlike the profile" in note for note in listener.notes) == 1


def test_inspect_names_the_norm(bundle: Path) -> None:
    found = describe_artifact(bundle, verify=False, progress=SILENT)
    assert "held-out windows" in str(found.facts["routing_norm_false_alarms"])
    assert "directions" not in str(found.details), "thousands of numbers"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda layers: layers.pop(), "does not fit the model's layers"),
        (lambda layers: layers[0]["experts"].__setitem__(-1, 99), "does not have"),
        (lambda layers: layers[0]["scale"].__setitem__(0, -1.0), "routing-norm.layers.0.scale"),
        (lambda layers: layers[0]["means"].pop(), "domains|means"),
    ],
)
def test_a_damaged_norm_is_refused(
    bundle: Path, tmp_path: Path, damage: Callable[[Any], None], complaint: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    json_changed(lambda parsed: damage(parsed["sections"]["routing-norm"]["body"]["layers"]))(
        copy / MANIFEST
    )
    with pytest.raises(CorruptArtifactError, match=complaint) as caught:
        BundleReader.open(copy)
    assert caught.value.exit_code == 3 and "\n" not in caught.value.message


def test_a_bundle_without_a_norm_runs_without_a_watch(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    json_changed(lambda parsed: parsed["sections"].pop("routing-norm"))(copy / MANIFEST)
    with open_session(copy, run_options(context=64, threads=1)) as session:
        assert session.runner.watch is None
        options = GenerateOptions(max_tokens=2, ignore_eos=True, raw=True)
        assert generate(session, "The list", options).drift is None
