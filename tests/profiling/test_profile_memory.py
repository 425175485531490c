"""A profile never grows beyond the budget that it was given, the smallest accepted one included."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.errors import BudgetError
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling import profile_memory
from moe_tool.profiling.profile_memory import LOGIT_ROWS, plan_profile_memory
from tests.table_models import make_table_model
from tests.tiny_models import TINY, make_tiny_checkpoint

_PROFILE = """
import json, sys
from pathlib import Path
from moe_tool.errors import BudgetError
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.text.sources import parse_sources
folder, out, memory, seq_len = sys.argv[1:]
try:
    report = record_profile(
        LocatedModel(folder=Path(folder), name="tiny"),
        parse_sources(["builtin"]),
        out=Path(out),
        tokens=4096,
        seq_len=int(seq_len),
        memory_bytes=int(memory),
    )
    print(json.dumps({"peak": report.peak_rss_bytes}))
except BudgetError as error:
    print(json.dumps({"hint": error.hint}))
"""


def profile(folder: Path, out: Path, memory_bytes: int, *, seq_len: int) -> dict[str, object]:
    command = [sys.executable, "-c", _PROFILE, str(folder), str(out)]
    command += [str(memory_bytes), str(seq_len)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def variant(arch: str, **changes: int) -> Callable[[], object]:
    def make() -> object:
        config = TINY[arch]()
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "changes", "seq_len"),
    [
        ("mixtral", {"vocab_size": 150_000, "max_position_embeddings": 1024}, 512),
        ("gpt_oss", {"max_position_embeddings": 4096}, 2048),
        ("mixtral", {"max_position_embeddings": 2048}, 1024),
    ],
    ids=["large vocabulary", "unfused attention", "plain"],
)
@pytest.mark.parametrize("extra_mib", [0, 256])
def test_peak_stays_inside_every_accepted_budget(
    arch: str,
    changes: dict[str, int],
    seq_len: int,
    extra_mib: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TINY, "variant", variant(arch, **changes))  # type: ignore[arg-type]
    folder = make_tiny_checkpoint("variant", tmp_path / "model", dtype="bfloat16")
    refused = profile(folder, tmp_path / "p.h5", 2**20, seq_len=seq_len)
    suggested = re.search(r"--memory ([\d.]+)MiB", str(refused["hint"]))
    assert suggested is not None
    budget = int((float(suggested[1]) + extra_mib) * 2**20)
    found = profile(folder, tmp_path / "p.h5", budget, seq_len=seq_len)
    assert int(str(found["peak"])) <= budget


def test_few_rows_of_logits_are_in_memory_at_once() -> None:
    assert LOGIT_ROWS * 256_000 * 4 <= 16 * 2**20


def test_a_table_of_which_rows_are_read_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_memory, "current_rss_bytes", lambda: 0)

    def needed_mib(n_rows: int) -> float:
        folder = make_table_model(tmp_path / str(n_rows), n_rows=n_rows, width=1024)
        opened = open_model(LocatedModel(folder=folder, name="m"))
        with opened.checkpoint, pytest.raises(BudgetError) as refused:
            width = opened.shape.hidden
            plan_profile_memory(opened, n_rows=8, width=width, n_tokens=8, seq_len=8, asked=1)
        found = re.search(r"--memory ([\d.]+)MiB", str(refused.value.hint))
        assert found is not None
        return float(found[1])

    few = needed_mib(512)
    # 63 MiB in memory, which are loaded, a quarter counted in each of 4 layers; then 64 MiB.
    assert needed_mib(4032) >= few + 12
    assert needed_mib(4096) <= few
