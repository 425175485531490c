"""One model type of the zoo."""

from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.zoo.zoo_fields import BASE, Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One model type, shrunk."""

    fields: Fields
    """Fields of the text model"""
    model_type: str = ""
    """Type of transformers; empty: the name in ZOO"""
    text_type: str = ""
    """Type of the text model of a composite one; empty: that of the composite's class"""
    parts: Fields | None = None
    """Fields beside text_config; None for a model that is not composite"""
    represents: bool = False
    """Whether it stands for its family in every test run"""
    streams: bool = True
    """Whether it can be read layer by layer"""
    without: frozenset[str] = field(default_factory=frozenset)
    """Common fields that the class computes itself"""

    def config(self, name: str) -> PreTrainedConfig:
        """Return the configuration."""
        kind = CONFIG_MAPPING[self.model_type or name]
        text = {key: value for key, value in BASE.items() if key not in self.without}
        text |= self.fields
        if self.parts is None:
            made: PreTrainedConfig = kind(**text)
            return made
        text_type = self.text_type or kind().text_config.model_type
        text_config = CONFIG_MAPPING[text_type](**text).to_dict()
        made = kind(text_config=text_config, **self.parts)
        return made


def shrunk(*groups: Fields, **fields: Any) -> Kind:
    """Return a text model; arguments of Kind, or else fields of its configuration."""
    names = Kind.__slots__
    own = {key: fields.pop(key) for key in names if key in fields}
    merged: Fields = {}
    for group in groups:
        merged |= group
    return Kind(fields=merged | fields, **own)
