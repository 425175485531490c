"""All model types of the zoo, and their list in README.md."""

from tests.zoo.composite_models import COMPOSITE_MODELS
from tests.zoo.text_models import TEXT_MODELS

ZOO = TEXT_MODELS | COMPOSITE_MODELS

TESTED_TYPES = tuple(sorted({kind.model_type or name for name, kind in ZOO.items()}))
"""Model types of transformers in the zoo"""
