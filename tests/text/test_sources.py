import gzip
import json
import socket
import threading
from pathlib import Path

import pytest

from moe_tool.errors import DataSourceError, NotFoundError, UsageError
from moe_tool.formats import hub_probe
from moe_tool.text import hub_datasets
from moe_tool.text.builtin import BUILTIN_DOMAINS, builtin_documents
from moe_tool.text.hub_datasets import HubDataset, parse_hub_spec
from moe_tool.text.sources import (
    HUB_ALIASES,
    TextSource,
    parse_sources,
    read_documents,
    require_sources,
)


def _read(spec: str | Path, *, seed: int = 0, offline: bool = False) -> list[str]:
    return list(read_documents(TextSource(domain="d", spec=str(spec)), seed=seed, offline=offline))


def test_builtin_is_two_domains_of_the_train_part() -> None:
    assert parse_sources(["builtin"]) == (
        TextSource(domain="docs", spec="builtin:docs"),
        TextSource(domain="code", spec="builtin:code"),
    )
    assert parse_sources(["builtin:eval"]) == (
        TextSource(domain="docs", spec="builtin:docs:eval"),
        TextSource(domain="code", spec="builtin:code:eval"),
    )
    assert parse_sources(["py=builtin:code:eval"]) == (
        TextSource(domain="py", spec="builtin:code:eval"),
    )


@pytest.mark.parametrize(
    ("argument", "domain", "spec"),
    [
        ("wiki=./wiki.txt", "wiki", "./wiki.txt"),
        ("./some/essays.jsonl", "essays", "./some/essays.jsonl"),
        ("./a=b.txt", "a=b", "./a=b.txt"),
        ("wikitext", "wikitext", HUB_ALIASES["wikitext"]),
        ("w=wikitext", "w", HUB_ALIASES["wikitext"]),
        ("org/name:config:test", "name", "org/name:config:test"),
        ("q=org/name", "q", "org/name"),
        ("no/such/text.parquet", "text", "no/such/text.parquet"),
    ],
)
def test_a_source_is_named_by_its_argument(argument: str, domain: str, spec: str) -> None:
    assert parse_sources([argument]) == (TextSource(domain=domain, spec=spec),)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [""],
        ["nosuchalias"],
        ["builtin:poems"],
        ["builtin:docs:code"],
        ["x=builtin"],
        ["builtin", "builtin:eval"],
        ["a=./x.txt", "a=./y.txt"],
        ["a/b/c"],
        ["org/na me"],
    ],
)
def test_what_cannot_be_a_source_is_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_sources(arguments)
    assert caught.value.hint


@pytest.mark.parametrize("domain", BUILTIN_DOMAINS)
def test_builtin_parts_share_no_document(domain: str) -> None:
    train = builtin_documents(domain, part="train")
    held_out = builtin_documents(domain, part="eval")
    names = set(train), set(held_out)
    assert not names[0] & names[1]
    sizes = [sum(map(len, part.values())) for part in (train, held_out)]
    assert 0.05 < sizes[1] / sum(sizes) < 0.2


def test_no_paragraph_of_a_held_out_topic_is_left_in_the_train_part() -> None:
    train = "\n\n".join(builtin_documents("docs", part="train").values())
    for text in builtin_documents("docs", part="eval").values():
        for paragraph in text.split("\n\n"):
            if len(paragraph.strip()) >= 60:
                assert f"\n\n{paragraph}\n\n" not in train


def test_builtin_text_is_read_whole_in_an_order_set_by_the_seed() -> None:
    first, again, other = (_read("builtin:docs:eval", seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    whole = sum(map(len, builtin_documents("docs", part="eval").values()))
    assert sum(map(len, first)) == whole
    assert sorted(first) == sorted(other)


def test_a_text_file_comes_in_blocks_that_add_up_to_it(tmp_path: Path) -> None:
    text = "".join(f"Article {number}\n{'word ' * (number % 300)}é\n\n" for number in range(900))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    blocks = _read(tmp_path / "a.txt")
    assert len(blocks) > 30
    assert sorted("".join(blocks)) == sorted(text)
    assert all(len(block.encode()) <= 16384 for block in blocks)
    assert all(block.startswith("Article") and block.endswith("\n\n") for block in blocks)
    assert _read(tmp_path / "a.txt", seed=1) != blocks


def test_a_folder_is_read_in_rounds_over_its_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    (tmp_path / "sub" / "small.py").write_text("print('small')\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "large.md").write_text("large " * 20000)
    for seed in range(3):
        blocks = _read(tmp_path, seed=seed)
        assert "print('small')\n" in blocks[:2]
        assert sum(map(len, blocks)) == 6 * 20000 + 15


def test_json_lines_give_text_or_content(tmp_path: Path) -> None:
    rows = [{"text": f"row {number} " + "x" * 700} for number in range(300)]
    lines = [json.dumps(row) for row in rows] + ["", json.dumps({"content": "last", "id": 1})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = _read(tmp_path / "a.jsonl")
    assert sorted(found) == sorted([row["text"] for row in rows] + ["last"])
    assert found[0] != rows[0]["text"] or _read(tmp_path / "a.jsonl", seed=1)[0] != rows[0]["text"]


def test_a_json_line_longer_than_a_block_is_read_once(tmp_path: Path) -> None:
    texts = ["a" * 200_000, "b", "c" * 70_000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert sorted(_read(tmp_path / "a.jsonl")) == sorted(texts)


def test_parquet_rows_are_read_by_row_group(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = [f"row {number}" for number in range(50)]
    table = pyarrow.table({"id": list(range(50)), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert sorted(_read(tmp_path / "a.parquet")) == sorted(texts)
    parquet.write_table(table.drop(["text"]), tmp_path / "b.parquet")
    with pytest.raises(DataSourceError, match="columns found: id"):
        _read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "only white space"),
        ("a.txt", b"text\0text", "binary (a zero byte at 4)"),
        ("a.txt", "café".encode("latin-1"), "not UTF-8 (byte 0xe9 at 3)"),
        ("a.txt", gzip.compress(b"text" * 100, mtime=0), "it is gzip"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "bro', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "good"}\n\n[1]\n', "line 3: wanted a JSON object, found a list"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', "line 1: no text in the field text or content;"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', "fields found: body, id"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.parquet", b"PAR1 but not really PAR1", "not a readable parquet file"),
        ("a.parquet", b"x", "not a readable parquet file"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataSourceError) as caught:
        _read(path)
    assert str(path) in caught.value.message
    assert said in caught.value.message
    assert path.read_bytes() == content


def test_a_broken_line_far_into_a_file_is_numbered(tmp_path: Path) -> None:
    good = json.dumps({"text": "x" * 100}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * 4000 + "broken\n" + good * 1000)
    with pytest.raises(DataSourceError, match="line 4001: not JSON"):
        _read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("spec", ["./nope.txt", "nope/text.jsonl", "/nope/folder", "./nope"])
def test_a_missing_path_is_said_to_be_missing_and_never_asked_of_the_hub(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_datasets, "hub_is_reachable", lambda: pytest.fail("asked the hub"))
    with pytest.raises(NotFoundError, match="no such file or folder"):
        read_documents(parse_sources([spec])[0], seed=0)


def test_a_folder_without_text_names_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataSourceError) as caught:
        _read(tmp_path)
    assert ".jsonl" in (caught.value.hint or "")


def test_hub_specs_name_config_and_split() -> None:
    assert parse_hub_spec("o/n") == HubDataset(name="o/n", config=None, split="train")
    assert parse_hub_spec("o/n:en") == HubDataset(name="o/n", config="en", split="train")
    assert parse_hub_spec("o/n:test") == HubDataset(name="o/n", config=None, split="test")
    assert parse_hub_spec("o/n:en:dev") == HubDataset(name="o/n", config="en", split="dev")


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_a_hub_source_is_refused_at_once(
    offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(hub_datasets, "hub_is_reachable", lambda: False)
    tried: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        tried.append(address)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(NotFoundError) as caught:
        read_documents(parse_sources(["wikitext"])[0], seed=0, offline=offline)
    assert tried == []  # its libraries would try again and again
    assert "Salesforce/wikitext" in caught.value.message
    assert str(tmp_path / "datasets" / "Salesforce___wikitext") in caught.value.message
    assert "./wikitext.txt" in (caught.value.hint or "")
    assert "--data builtin" in (caught.value.hint or "")


def test_the_probe_gives_up_on_a_name_server_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _forget_environment(monkeypatch)

    answers = threading.Event()

    def hang(*arguments: object, **options: object) -> None:
        answers.wait()
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    assert not hub_probe.hub_is_reachable(timeout_s=0.1)  # or this would never come back
    answers.set()


def test_the_probe_finds_a_mirror_that_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_environment(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_probe.hub_is_reachable()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_probe.hub_is_reachable()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub_probe.hub_is_reachable()


def _forget_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_sources_out_of_reach_are_refused_before_anything_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _forget_environment(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    require_sources(parse_sources(["builtin"]))
    with pytest.raises(NotFoundError, match="nowhere.txt does not exist"):
        require_sources(parse_sources([f"a={tmp_path}/nowhere.txt"]))
    with pytest.raises(NotFoundError, match="Salesforce/wikitext"):
        require_sources(parse_sources(["wikitext"]))


def test_a_link_to_itself_is_a_source_that_is_not_there(tmp_path: Path) -> None:
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    sources = parse_sources([str(loop)])
    assert sources[0].domain == "loop"
    with pytest.raises(NotFoundError, match="does not exist"):
        require_sources(sources)


def test_a_home_folder_of_nobody_is_a_source_that_is_not_there() -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        require_sources(parse_sources(["~nosuchuser-/a.txt"]))
