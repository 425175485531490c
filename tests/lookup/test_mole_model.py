"""MoLE for transformers: the layer's formula, generation, saving, tables in place of experts."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moe_tool.models.mole.config import MoleConfig, as_table
from moe_tool.models.mole.expert_rows import expert_rows
from moe_tool.models.mole.modeling import MoleForCausalLM
from tests.lookup.tiny_mole import make_mole, tiny_config, tiny_mole
from tests.tiny_models import VOCABULARY

IDS = torch.tensor([[3, 7, 3, 200, 259, 7], [9, 9, 1, 0, 4, 5]])


def in_table_form(model: MoleForCausalLM, dtype: torch.dtype = torch.float32) -> MoleForCausalLM:
    """Return a model that looks up the rows of the whole vocabulary, rounded to `dtype`."""
    table = MoleForCausalLM(as_table(model.config)).eval()
    state = {k: v for k, v in model.state_dict().items() if ".expert" not in k}
    rows = expert_rows(model, torch.arange(model.config.vocab_size)).to(dtype).float()
    table.load_state_dict(state | {"model.row_table.weight": rows})
    return table


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def test_without_experts_it_is_a_llama() -> None:
    model = tiny_mole()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "experts" in name:
                tensor.zero_()
    fields = {
        k: getattr(model.config, k) for k in LlamaConfig().to_dict() if k in vars(model.config)
    }
    fields.pop("model_type", None)
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    shared = {
        k: v for k, v in model.state_dict().items() if "expert" not in k and "router" not in k
    }
    llama.load_state_dict(shared)
    assert torch.allclose(logits(model), logits(llama), atol=1e-6)


def test_layers_follow_the_formula() -> None:
    """With attention switched off a layer is a sum that a few lines can do."""
    model = tiny_mole()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    w = model.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * w[name]

    embedded = h = w["model.embed_tokens.weight"][IDS]
    for index in range(3):
        at = f"model.layers.{index}."
        u = norm(h, at + "post_attention_layernorm.weight")
        gates = (u @ w[at + "router.weight"].T).softmax(-1)
        e = norm(embedded, at + "expert_layernorm.weight")  # the raw embedding, in every layer
        shared = functional.silu(u @ w[at + "mlp.gate_proj.weight"].T) * (
            u @ w[at + "mlp.up_proj.weight"].T
        )
        h = h + shared @ w[at + "mlp.down_proj.weight"].T
        for j in range(5):
            up = functional.gelu(e @ w[f"{at}experts.{j}.up_proj.weight"].T)
            h = h + gates[..., j, None] * (up @ w[f"{at}experts.{j}.down_proj.weight"].T)
    wanted = norm(h, "model.norm.weight") @ w["lm_head.weight"].T
    assert torch.allclose(logits(model), wanted, atol=1e-4, rtol=1e-5)


def test_a_table_answers_as_the_experts_over_the_whole_vocabulary() -> None:
    model = tiny_mole()
    whole = torch.cat([torch.arange(VOCABULARY), torch.arange(VOCABULARY).flip(0)]).view(-1, 52)
    exact = logits(model, whole)
    assert (logits(in_table_form(model), whole) - exact).abs().max() <= 1e-5
    half = logits(in_table_form(model, torch.float16), whole)
    assert 0 < (half - exact).abs().max() <= 1e-2


def test_forgetting_the_norm_would_be_seen() -> None:
    model = tiny_mole()
    table = in_table_form(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.expert_layernorm.weight.fill_(1.0)
    assert (logits(table) - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("is_tied", [False, True])
def test_saved_and_reloaded(tmp_path: Path, is_tied: bool) -> None:
    folder = make_mole(tmp_path / "mole", tie_word_embeddings=is_tied)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (
        type(loaded) is MoleForCausalLM and type(AutoConfig.from_pretrained(folder)) is MoleConfig
    )
    assert torch.equal(logits(loaded), logits(tiny_mole(tie_word_embeddings=is_tied)))
    table = in_table_form(loaded)
    table.save_pretrained(tmp_path / "table")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "table").eval()
    assert torch.equal(logits(again), logits(table))


def test_generation_with_a_cache_equals_generation_without() -> None:
    model = tiny_mole()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(IDS, **settings)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **settings))
    assert torch.equal(cached, in_table_form(model).generate(IDS, **settings))


def test_embeddings_in_place_of_ids_are_refused() -> None:
    model = tiny_mole()
    with pytest.raises(ValueError, match="by token id"):
        model(inputs_embeds=model.model.embed_tokens(IDS))


def test_it_trains() -> None:
    model = tiny_mole().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "wrong", [{"experts_form": "cloud"}, {"num_experts": 0}, {"num_experts": 10**6}]
)
def test_impossible_configurations_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Exception, match=next(iter(wrong))):
        tiny_config(**wrong)
