"""Answers as short lists, for comparisons by hand."""

import numpy as np

from moe_tool.artifacts.routing import Answers


def shown(answers: Answers) -> list[list[int]]:
    """Return the experts that run, -1 in empty slots."""
    found: list[list[int]] = np.where(answers.present, answers.expert, -1).tolist()
    return found
