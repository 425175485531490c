"""Demo model: a small MoE model shipped with the package, so that every command runs anywhere.

It was trained on text that every Python installation contains.
"""

from pathlib import Path


def demo_model_path() -> Path:
    """Return the folder of the demo checkpoint: config, weights, tokenizer, and training.json."""
    return Path(__file__).parent / "model"
