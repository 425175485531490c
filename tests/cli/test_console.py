"""Results and people have their own channels."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from moe_tool.cli import console
from moe_tool.cli.console import Output, open_output, write_json


def test_with_json_whatever_prints_on_stdout_goes_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open_output(as_json=True) as output:
        print("a library talks")
        output.stream("a token")
        output.show("a table")
        output.say("a note")
        output.result({"answer": 42})
    out, err = capsys.readouterr()
    fields = json.loads(out)
    assert fields["answer"] == 42
    assert set(fields) == {"answer", "seconds", "peak_rss_bytes"}
    assert fields["seconds"] >= 0 and fields["peak_rss_bytes"] > 0
    assert err == "a library talks\na table\na note\n"


def test_without_json_stdout_holds_the_result_for_people(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open_output(as_json=False) as output:
        output.stream("a token")
        output.say("a note")
        output.result({"answer": 42})
    assert capsys.readouterr() == ("a token", "a note\n")


def test_json_has_no_numbers_that_json_cannot_say() -> None:
    stream = io.StringIO()
    write_json(
        {
            "nan": float("nan"),
            "inf": -float("inf"),
            "half": np.float32(0.5),
            "count": np.int64(3),
            "yes": np.bool_(True),
            "path": Path("a/b"),
            "array": np.arange(2),
            "domains": {"wiki": {"kl": (1.0, None)}},
        },
        stream,
    )
    assert json.loads(stream.getvalue()) == {
        "nan": None,
        "inf": None,
        "half": 0.5,
        "count": 3,
        "yes": True,
        "path": "a/b",
        "array": [0, 1],
        "domains": {"wiki": {"kl": [1.0, None]}},
    }
    assert stream.getvalue().count("\n") == 1


def test_progress_in_a_log_is_a_plain_line_at_most_every_half_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    people = io.StringIO()
    progress = Output(as_json=False, data=io.StringIO(), people=people).progress
    progress.begin("layer 0", 100, "tokens")
    for _ in range(70):
        now[0] += 1.0
        progress.advance()
    progress.end()
    assert people.getvalue().splitlines() == [
        "layer 0: 30 of 100 tokens, about 70 s left",
        "layer 0: 60 of 100 tokens, about 40 s left",
    ]


def test_progress_of_unknown_length_says_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    people = io.StringIO()
    progress = Output(as_json=False, data=io.StringIO(), people=people).progress
    progress.begin("read text", None, "documents")
    now[0] = 31.0
    progress.advance(7)
    progress.note("taken: profiles/demo.h5")
    assert people.getvalue() == "read text: 7 documents\ntaken: profiles/demo.h5\n"
