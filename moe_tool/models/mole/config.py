"""Configuration of a Mixture of Lookup Experts; importing it makes AutoConfig know the type."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig

MODEL_TYPE = "mole"
FORMS = ("ffn", "table")
_MOST_EXPERTS = 4096


@strict
class MoleConfig(LlamaConfig):
    """Configuration of a Llama whose layers have N lookup experts beside their MLP.

    An expert sees the token's embedding, so that after training its outputs are a table with one
    row per token id. Source: arXiv:2503.15798.
    """

    model_type = MODEL_TYPE

    num_experts: int = 4
    """N, experts of each layer; every token uses all of them"""
    expert_intermediate_size: int = 11008
    """Hidden width of an expert; 4 d is best in the paper"""
    experts_form: str = "ffn"
    """Experts as networks, for training, or as one table [V, L * N * d]"""

    def validate_architecture(self) -> None:
        """Refuse numbers that no model has, before modules are built from them.

        Raises:
            ValueError: experts, their width or their form are impossible.
        """
        super().validate_architecture()  # type: ignore[no-untyped-call]
        if self.experts_form not in FORMS:
            raise ValueError(f"experts_form is {self.experts_form!r:.32}, wanted ffn or table")
        if not 1 <= self.num_experts <= _MOST_EXPERTS:
            raise ValueError(f"num_experts is {self.num_experts}, wanted 1 to {_MOST_EXPERTS}")
        if not 1 <= self.expert_intermediate_size < 2**31:
            raise ValueError(f"expert_intermediate_size is {self.expert_intermediate_size}")

    @property
    def row_width(self) -> int:
        """Number of values in a token's row: L * N * d"""
        return int(self.num_hidden_layers * self.num_experts * self.hidden_size)


def as_table(config: MoleConfig) -> MoleConfig:
    """Return a copy of a configuration whose experts are a table."""
    fields: dict[str, Any] = config.to_dict()
    return MoleConfig.from_dict(fields | {"experts_form": "table"})


AutoConfig.register(MODEL_TYPE, MoleConfig, exist_ok=True)
