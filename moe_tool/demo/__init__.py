"""The embedded model: a small mixture of experts, so that every verb runs on any machine.

It has learned the text that each Python installation carries.
"""

from pathlib import Path


def demo_model_path() -> Path:
    """Return the embedded checkpoint: config, weights, tokenizer, and training.json."""
    return Path(__file__).parent / "model"
