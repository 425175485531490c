"""Two tasks of lm_eval with their data, as files."""

import json
from pathlib import Path

import yaml

DOCUMENTS = [
    {
        "question": f"The list of {thing} is",
        "choices": [" a list of words", " empty", " returned"],
        "answer": index % 3,
    }
    for index, thing in enumerate(["items", "numbers", "files", "names"])
]


def write_tasks(folder: Path, *, metric: str = "acc") -> Path:
    """Write tiny_choice.yaml, tiny_text.yaml and their data; returns the folder."""
    data = folder / "documents.json"
    data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        **source,
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    text = {
        **source,
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder
