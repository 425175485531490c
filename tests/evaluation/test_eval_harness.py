"""Tasks are found, loaded and answered; what cannot be is told in a sentence."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_tool.errors import DataSourceError, NotFoundError, UsageError
from moe_tool.evaluation.eval_harness import (
    HarnessReport,
    metric_rows,
    require_lm_eval,
    run_harness,
)
from moe_tool.evaluation.harness_tasks import HarnessOptions
from moe_tool.models.locate import LocatedModel
from moe_tool.runtime.run_options import run_options
from tests.evaluation.small_tasks import DOCUMENTS, write_tasks
from tests.packed import pack_bundle

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is an extra"
)
Refusal = type[UsageError] | type[NotFoundError] | type[DataSourceError]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("harness") / "bundle"
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="mixtral")
    pack_bundle(model, out=out, bits="native")
    return out


def run(
    bundle: Path, *tasks: str | Path, policy: str = "exact", **options: object
) -> HarnessReport:
    return run_harness(
        bundle,
        run_options(memory="50%", policy=policy, gates=False),
        HarnessOptions(tasks=tuple(map(str, tasks)), offline=True, **options),  # type: ignore[arg-type]
    )


def answer_by_transformers(checkpoint: Path) -> tuple[list[bool], list[bool]]:
    """Whether the ordinary model finds each document's answer likeliest, and generates it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    right, repeated = [], []
    for document in DOCUMENTS:
        question = tokenizer(document["question"], return_tensors="pt").input_ids
        likely = []
        for choice in document["choices"]:
            answer = tokenizer(choice, return_tensors="pt").input_ids
            with torch.inference_mode():
                logits = model(torch.cat([question, answer], dim=1)).logits[0].double()
            found = logits[question.shape[1] - 1 : -1].log_softmax(dim=-1)
            likely.append(float(found.gather(1, answer.T).sum()))
        right.append(int(np.argmax(likely)) == document["answer"])
        with torch.inference_mode():
            made = model.generate(question, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(made[0, question.shape[1] :]).partition("\n")[0]
        repeated.append(text == document["choices"][document["answer"]])
    return right, repeated


@needs_lm_eval
@pytest.mark.slow
def test_local_tasks_are_answered_and_counted(
    bundle: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    write_tasks(tmp_path)
    report = run(bundle, tmp_path)
    assert [(row.task, row.metric, row.samples) for row in report.rows] == [
        ("tiny_choice", "acc", len(DOCUMENTS)),
        ("tiny_text", "exact_match", len(DOCUMENTS)),
    ]
    choice, text = report.rows
    right, repeated = answer_by_transformers(tiny_checkpoint("mixtral"))
    assert choice.value == np.mean(right) and 0 < choice.value < 1
    assert choice.stderr == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)
    assert text.value == np.mean(repeated)
    assert (choice.version, choice.shots, choice.higher_is_better) == ("1.0", 0, True)
    assert report.decode.hits + report.decode.misses > 0 and report.decode.bytes_read > 0
    # Of a question, the answers are fed but for their last byte, and its text once.
    fed = [len(choice) - 1 for document in DOCUMENTS for choice in document["choices"]]
    n_generated = 8 - 1
    assert report.decode.tokens <= sum(fed) + len(DOCUMENTS) * n_generated
    assert report.decode.tokens >= sum(fed)


@needs_lm_eval
@pytest.mark.slow
def test_limit_shots_and_policy_are_followed(bundle: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    report = run(
        bundle, "tiny_choice", policy="random", include=(tmp_path,), limit=2, num_fewshot=1
    )
    assert [(row.shots, row.samples) for row in report.rows] == [(1, 2)]
    assert report.lossy and report.decode.substitutions > 0 and report.setup.residency == "frozen"
    assert report.decode.bytes_read == 0
    again = run(bundle, "tiny_choice", policy="random", include=(tmp_path,), limit=2, num_fewshot=1)
    assert again.rows == report.rows


@needs_lm_eval
@pytest.mark.slow
def test_a_group_has_a_row_of_its_own(bundle: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [tiny_choice, tiny_choice_again]\n"
        "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    text = (tmp_path / "tiny_choice.yaml").read_text()
    (tmp_path / "again.yaml").write_text(text.replace("tiny_choice", "tiny_choice_again"))
    report = run(bundle, "both", include=(tmp_path,))
    values = {row.task: row.value for row in report.rows}
    assert values.keys() == {"both", "tiny_choice", "tiny_choice_again"}
    assert len(set(values.values())) == 1


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "refusal", "words"),
    [
        ("./no/such.yaml", NotFoundError, "no task file"),
        ("./empty/", DataSourceError, "holds no task"),
        ("./remote.yaml", NotFoundError, "'remote.yaml': --offline forbids the network"),
        ("./broken.yaml", DataSourceError, "'broken.yaml' cannot be loaded"),
        ("./metric.yaml", UsageError, "'no_such_metric' is not part of lm_eval"),
        ("./template.yaml", DataSourceError, "template"),
    ],
)
def test_what_cannot_be_loaded_is_told(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    refusal: Refusal,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    text = (write_tasks(tmp_path) / "tiny_choice.yaml").read_text()
    source = str(tmp_path / "documents.json")
    (tmp_path / "remote.yaml").write_text(
        "task: remote\ndataset_path: no-such-org/no-such-set\noutput_type: loglikelihood\n"
        "test_split: test\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    (tmp_path / "broken.yaml").write_text(text.replace(source, f"{source}.missing"))
    (tmp_path / "metric.yaml").write_text(text.replace("metric: acc", "metric: no_such_metric"))
    (tmp_path / "template.yaml").write_text(text.replace("{{question}}", "{{question"))
    with pytest.raises(refusal, match=words) as caught:
        run(bundle, task)
    assert caught.value.hint


@needs_lm_eval
@pytest.mark.slow  # lm_eval lists its own tasks for 10 s
def test_an_unknown_name_is_told_with_its_neighbours(bundle: Path) -> None:
    with pytest.raises(UsageError, match="'arc_easi' is not known") as caught:
        run(bundle, "arc_easi")
    assert "arc_easy" in (caught.value.hint or "")


def test_without_lm_eval_it_says_how_to_install_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        require_lm_eval()
    assert caught.value.hint == "pip install 'moe-tool[eval-harness]'"


def test_rows_are_told_from_lm_evals_results() -> None:
    results = {
        "results": {
            "one": {
                "alias": "one",
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "f1,strict": 0.25,
                "f1_stderr,strict": "N/A",
            },
            "all": {"alias": "all", "acc,none": 0.75},
        },
        "versions": {"one": 2.0},
        "n-shot": {"one": 5},
        "n-samples": {"one": {"original": 10, "effective": 4}},
        "higher_is_better": {"one": {"acc": True}},
    }
    first, second, group = metric_rows(results)
    assert (first.metric, first.value, first.stderr, first.samples) == ("acc", 0.5, 0.1, 4)
    assert (second.metric, second.filter, second.stderr) == ("f1", "strict", None)
    assert (group.task, group.shots, group.samples, group.version) == ("all", None, None, "")
