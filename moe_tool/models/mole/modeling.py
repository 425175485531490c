"""Mixture of Lookup Experts for transformers; importing it makes AutoModelForCausalLM know it."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from moe_tool.models.mole.config import MoleConfig


class LookupExpert(nn.Module):
    """One expert: up, GELU, down, without biases and without a gate matrix."""

    def __init__(self, config: MoleConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.expert_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.expert_intermediate_size, config.hidden_size, bias=False)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return [U, d] of normed embeddings [U, d]."""
        found: torch.Tensor = self.down_proj(nn.functional.gelu(self.up_proj(embedded)))
        return found


class MoleLayer(LlamaDecoderLayer):
    """Decoder layer h1 + MLP(u) + sum_j g_j FFN_j(RMS(embed(id))), where u is h1 normed and g the
    softmax of the router over all experts."""

    def __init__(self, config: MoleConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[no-untyped-call]
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts: nn.ModuleList | None = None
        if config.experts_form == "ffn":
            self.expert_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            experts = [LookupExpert(config) for _ in range(config.num_experts)]
            self.experts = nn.ModuleList(experts)

    def expert_rows(self, embedded: torch.Tensor) -> torch.Tensor:
        """Return the outputs of all experts, [U, N, d], for embeddings [U, d]."""
        assert self.experts is not None
        normed = self.expert_layernorm(embedded)
        return torch.stack([expert(normed) for expert in self.experts], dim=1)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        rows: torch.Tensor,
        places: torch.Tensor,
        **attention: Any,
    ) -> torch.Tensor:
        """Return [B, S, d].

        Args:
            hidden_states: [B, S, d].
            rows: [U, N, d] outputs of the experts for each distinct token.
            places: [B, S] number of each token's row.
            attention: arguments of transformers' attention.
        """
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **attention)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        gates = self.router(normed).softmax(dim=-1, dtype=torch.float32).to(normed.dtype)
        looked_up = torch.matmul(gates.unsqueeze(-2), rows[places].to(normed.dtype)).squeeze(-2)
        found: torch.Tensor = hidden_states + self.mlp(normed) + looked_up
        return found


class MolePreTrainedModel(LlamaPreTrainedModel):  # type: ignore[no-untyped-call]
    """Base of the model's two classes."""

    config: MoleConfig
    _no_split_modules = ["MoleLayer"]
    _can_record_outputs: dict[str, Any] = {}


class MoleModel(MolePreTrainedModel):
    """Decoder without a head. All rows of the tokens at hand are looked up before layer 0."""

    def __init__(self, config: MoleConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = [MoleLayer(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)  # type: ignore[no-untyped-call]
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.row_table: nn.Module | None = None
        """Function of ids [U] to rows [U, L * N * d]; a class that reads them may stand in"""
        if config.experts_form == "table":
            self.row_table = nn.Embedding(config.vocab_size, config.row_width)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states, [B, S, d], and the KV cache.

        Raises:
            ValueError: there are no token ids, or embeddings beside them.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("MoLE looks experts up by token id: give input_ids, not inputs_embeds")
        hidden = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        unique, places = torch.unique(input_ids, return_inverse=True)
        table = None
        if self.row_table is not None:
            table = self.row_table(unique).unflatten(-1, (len(self.layers), -1, hidden.shape[-1]))
        embedded = self.embed_tokens(unique)
        rotated = self.rotary_emb(hidden, position_ids=position_ids)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, MoleLayer)
            rows = layer.expert_rows(embedded) if table is None else table[:, index]
            hidden = layer(
                hidden,
                rows,
                places,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=rotated,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


class MoleForCausalLM(MolePreTrainedModel, GenerationMixin):
    """Mixture of Lookup Experts with a head over the vocabulary. Source: arXiv:2503.15798."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoleConfig) -> None:
        super().__init__(config)
        self.model = MoleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, S, V], and with labels [B, S] the loss of the next token.

        Raises:
            ValueError: there are no token ids.
        """
        kwargs.pop("return_dict", None)
        output = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values
        )


AutoModelForCausalLM.register(MoleConfig, MoleForCausalLM, exist_ok=True)
