import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from moe_tool.demo import demo_model_path
from moe_tool.demo.measure import MAX_WEIGHT_BYTES, measure_demo_model, unmet_criteria
from moe_tool.demo.training import per_layer_balance_loss
from moe_tool.demo.upcycling import upcycle


def test_the_embedded_model_is_a_small_mixture() -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (16, 2)
    assert config["num_hidden_layers"] >= 4
    assert (demo_model_path() / "model.safetensors").stat().st_size <= MAX_WEIGHT_BYTES == 8_000_000


def test_its_tokenizer_gives_back_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    text = "def f(x):\n\treturn 'ünïcode 漢字 🙂'  # end\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids[1:]) == text
    assert max(tokenizer.get_vocab().values()) < 2048
    assert tokenizer.chat_template is None


@pytest.mark.slow
def test_it_has_learned_what_it_was_made_for() -> None:
    figures = measure_demo_model(demo_model_path(), n_tokens=8192)
    weight_bytes = (demo_model_path() / "model.safetensors").stat().st_size
    assert unmet_criteria(figures, weight_bytes=weight_bytes) == []
    recorded = json.loads((demo_model_path() / "training.json").read_text())["held_out"]
    # A third of the recorded tokens: docs vary by topic, so the two agree only roughly.
    assert figures.perplexity == pytest.approx(recorded["perplexity"], rel=0.3)
    assert figures.unigram_perplexity == pytest.approx(recorded["unigram_perplexity"], rel=0.2)


@pytest.mark.slow
def test_it_goes_on_about_python() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    prompt = tokenizer("The list", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]
    words = tokenizer.decode(ids, skip_special_tokens=True).split()
    assert words[:2] == ["The", "list"]
    assert len(set(words)) >= 8


def test_an_even_layer_cannot_hide_a_collapsed_one() -> None:
    even = torch.eye(4).repeat(8, 1) * 50  # [32, E]: each expert is first choice equally often
    collapsed = torch.tensor([50.0, 0.0, 0.0, 0.0]).repeat(32, 1)
    assert per_layer_balance_loss((even,), top_k=1).item() == pytest.approx(1)
    assert per_layer_balance_loss((collapsed,), top_k=1).item() == pytest.approx(4)
    assert per_layer_balance_loss((even, collapsed), top_k=1).item() == pytest.approx(2.5)


def test_upcycled_experts_share_the_channels_that_were_not_redrawn() -> None:
    dense = _tiny_dense()
    mixture = upcycle(dense, n_experts=4, top_k=2, redrawn_share=0.5, seed=1)
    again = upcycle(dense, n_experts=4, top_k=2, redrawn_share=0.5, seed=1)
    source, target = dense.state_dict(), mixture.state_dict()
    assert all(torch.equal(target[name], value) for name, value in again.state_dict().items())
    experts = "model.layers.0.mlp.experts."
    gate_up = source[experts + "gate_up_proj"], target[experts + "gate_up_proj"]  # [E, 2I, H]
    down = source[experts + "down_proj"], target[experts + "down_proj"]  # [E, H, I]
    kept_sets = []
    for expert_id in range(4):
        kept = (down[1][expert_id] == down[0][0]).all(dim=0)  # [I]
        assert kept.sum() == 4  # half of eight channels
        for half in (0, 8):  # gate, then up
            same = gate_up[1][expert_id, half : half + 8] == gate_up[0][0, half : half + 8]
            assert torch.equal(same.all(dim=1), kept)
        kept_sets.append(tuple(kept.tolist()))
    assert len(set(kept_sets)) > 1
    assert torch.equal(source["lm_head.weight"], target["lm_head.weight"])


def test_upcycling_without_redrawing_leaves_the_function_as_it_was() -> None:
    dense = _tiny_dense()
    mixture = upcycle(dense, n_experts=4, top_k=2, redrawn_share=0.0, seed=1)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.allclose(dense(ids).logits, mixture(ids).logits, atol=1e-5)


@pytest.mark.slow
def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    from moe_tool.demo.train import main

    hashes = []
    for attempt in ("first", "second"):
        main(["--quick", "--out", str(tmp_path / attempt)])
        files = sorted((tmp_path / attempt).iterdir())
        hashes.append([(file.name, hashlib.sha256(file.read_bytes()).digest()) for file in files])
    assert hashes[0] == hashes[1]
    assert "model.safetensors" in dict(hashes[0])
    assert not list(tmp_path.glob("*.unfinished"))


def test_quick_training_does_not_overwrite_the_embedded_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moe_tool.demo.train import main

    with pytest.raises(SystemExit):
        main(["--quick"])
    assert "--out" in capsys.readouterr().err


def _tiny_dense() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=1,
        num_experts_per_tok=1,
    )
    return MixtralForCausalLM(config)
