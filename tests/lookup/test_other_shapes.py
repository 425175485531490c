"""MoLEs of unusual shapes are packed, run and measured as the usual one is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tool.cli.app import run_command
from moe_tool.evaluation.evaluate import EvaluateOptions
from moe_tool.evaluation.evaluate_lookup import evaluate_lookup
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.lookup import pack_lookup as packing
from moe_tool.lookup.disk_rows import load_model
from moe_tool.lookup.pack_lookup import pack_lookup
from moe_tool.lookup.run_lookup import run_lookup
from moe_tool.models.locate import LocatedModel
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.text.sources import parse_sources
from tests.lookup.tiny_mole import make_mole, tiny_mole
from tests.tiny_models import VOCABULARY

SHAPES: dict[str, dict[str, Any]] = {
    "tied embeddings": {"tie_word_embeddings": True},
    "one expert": {"num_experts": 1},
    "one layer": {"num_hidden_layers": 1, "num_experts": 1},
    # 263 rows of 600 values: computed 7 at once, hashed and scaled in blocks that end short.
    # Codes of a row end off a multiple of four bytes, where scales begin.
    "odd codes": {
        "num_hidden_layers": 1,
        "num_experts": 7,
        "hidden_size": 36,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "odd sizes": {"vocab_size": VOCABULARY + 3, "hidden_size": 40, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", ["native", "8", "nf4"])
def test_a_model_of_any_shape_is_what_it_was(
    shape: str, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SHAPES[shape]
    exact = tiny_mole(**changes)
    config = exact.config
    monkeypatch.setattr(packing, "_BLOCK_BYTES", 7 * 4 * config.row_width)
    located = LocatedModel(folder=make_mole(tmp_path / "model", **changes), name="tiny")
    bundle = tmp_path / "bundle"
    report = pack_lookup(located, bits=bits, out=bundle)
    width = config.num_hidden_layers * config.num_experts * config.hidden_size
    scales = 4 * -(-width // 64)
    sizes = {"native": 4 * width, "8": width + scales, "nf4": -(-width // 2) + scales}
    assert report.row_bytes == sizes[bits]
    assert run_command(["inspect", str(bundle), "--verify"]) == 0

    model, table = load_model(LookupBundle.open(bundle))
    vocabulary = config.vocab_size
    ids = torch.arange(vocabulary // 4 * 4).view(4, -1)
    ids[-1, -1] = vocabulary - 1
    with torch.inference_mode():
        away = (model(input_ids=ids).logits - exact(input_ids=ids).logits).abs().max()
    table.rows.close()
    assert away <= 1e-5 or bits != "native"
    if bits == "native":
        prompt = "the cat sat"
        wanted = exact.generate(
            torch.tensor([load_tokenizer(bundle)(prompt)["input_ids"]]),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )[0, -6:].tolist()
        options = GenerateOptions(max_tokens=6, ignore_eos=True)
        found = run_lookup(
            bundle, prompt, memory=None, context=64, threads=None, generation=options
        )
        assert list(found.token_ids) == wanted

    text = parse_sources(["builtin:eval"])
    options = EvaluateOptions(tokens=64, seq_len=32)
    kl = evaluate_lookup(bundle, text, options, reference=located).figures.kl_source_mean
    assert kl is not None and (kl.value < 1e-9) == (bits == "native") and kl.value < 1
