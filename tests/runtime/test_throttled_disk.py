"""A throttled run computes the same, and every byte that it reads passes the slow disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tool.models.locate import LocatedModel
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.store.throttle import ThrottledDisk
from tests.packed import pack_bundle
from tests.tiny_models import tiny_tokenizer
from tests.zoo.text_models import TEXT_MODELS


@torch.inference_mode()
def _decode(session: Session) -> torch.Tensor:
    cache = session.new_cache()
    session.model(input_ids=torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
    rows = [
        session.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
        for token in range(20, 30)
    ]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("prefetch", ["none", "next-layer"])
def test_all_bytes_pass_the_slow_disk(
    prefetch: str, tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    disks: set[ThrottledDisk] = set()

    def wait(disk: ThrottledDisk, n_bytes: int, *, since: float, is_first: bool = True) -> None:
        passed.append(n_bytes)
        disks.add(disk)

    monkeypatch.setattr(ThrottledDisk, "wait", wait)
    bundle = tiny_bundle("qwen3_moe")
    options = {"memory": "40%", "prefetch": prefetch, "context": 64, "threads": 1}
    with open_session(bundle, run_options(**options)) as session:
        expected = _decode(session)
    assert not passed
    with open_session(bundle, run_options(throttle="1MB/s,1ms", **options)) as session:
        assert torch.equal(_decode(session), expected)
        stats = session.runner.stats
        read = stats.prompt.bytes_read + stats.decode.bytes_read
    # A prefetch that was cancelled by the end of the session is counted nowhere.
    assert sum(passed) >= read > 0
    assert prefetch != "none" or sum(passed) == read
    assert len(disks) == 1


def test_rows_of_tables_pass_the_same_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = TEXT_MODELS["gemma4_text"].config("gemma4_text")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    pack_bundle(LocatedModel(folder=tmp_path / "m", name="tiny"), out=tmp_path / "b")
    passed: list[int] = []
    disks: set[ThrottledDisk] = set()

    def wait(disk: ThrottledDisk, n_bytes: int, *, since: float, is_first: bool = True) -> None:
        passed.append(n_bytes)
        disks.add(disk)

    monkeypatch.setattr(ThrottledDisk, "wait", wait)
    options = {"memory": "min", "rows": "1", "context": 64, "threads": 1}
    with open_session(tmp_path / "b", run_options(**options)) as session:
        expected = _decode(session)
    assert not passed
    with open_session(tmp_path / "b", run_options(throttle="1MB/s,1ms", **options)) as session:
        assert session.plan.on_disk
        _decode(session)  # every block that the tokens need is read whole, once, to be checked
        tables, before = session.bundle.tables, _bytes_read(session)
        n_rows, n_passed = tables.bytes_read, sum(passed)
        assert torch.equal(_decode(session), expected)
        rows = tables.bytes_read - n_rows
        assert rows > 0 and sum(passed) - n_passed == _bytes_read(session) - before + rows
    assert len(disks) == 1


def _bytes_read(session: Session) -> int:
    stats = session.runner.stats
    return stats.prompt.bytes_read + stats.decode.bytes_read
