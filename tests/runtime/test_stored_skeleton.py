"""A skeleton computes from what its bundle holds: codes or narrow floats, held once."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_tool.models.locate import LocatedModel
from moe_tool.models.stored_modules import StoredEmbedding, StoredLinear
from moe_tool.native.kernels import is_native
from moe_tool.quantization.round_to_nearest import dequantize, quantize
from moe_tool.quantization.tokens import round_trip_tokens
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from tests.packed import pack_bundle
from tests.tiny_models import TINY

OPTIONS = run_options(memory="min", context=64, threads=1)
PROMPT = [256, 84, 104, 101, 32, 108, 105, 115, 116]
TIED = ("granitemoe", "ernie4_5_moe")
TinyBundle = Callable[..., Path]


@torch.inference_mode()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """[9, V]"""
    return model(input_ids=torch.tensor([PROMPT])).logits[0]


def reference(folder: Path, bits: int) -> PreTrainedModel:
    """transformers' model with rounded matrices, whose tokens are rounded as they come."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or name.endswith((".wg", "shared_expert_gate")):
            continue
        rounded = dequantize(quantize(module.weight.detach(), bits))
        module.weight = nn.Parameter(rounded)  # the table of a tied head is left alone
        module.register_forward_pre_hook(_round_tokens)
    return model


def _round_tokens(module: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    (x,) = args
    return round_trip_tokens(x.reshape(-1, x.shape[-1]), 64).view(x.shape)


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("arch", TINY)
def test_logits_equal_those_of_a_model_with_rounded_matrices(
    arch: str, bits: str, tiny_checkpoint: Callable[..., Path], tiny_bundle: TinyBundle
) -> None:
    wanted = logits_of(reference(tiny_checkpoint(arch), int(bits)))
    with open_session(tiny_bundle(arch, skeleton_bits=bits), OPTIONS) as session:
        found = logits_of(session.model)
    # A token's code lies on an edge now and then and falls to the other side: one step of 1/127.
    assert (found - wanted).abs().max() <= 0.02 * wanted.std()


@pytest.mark.parametrize("arch", TINY)
def test_every_architecture_generates(arch: str, tiny_bundle: TinyBundle) -> None:
    with open_session(tiny_bundle(arch, "4", "bfloat16", "4"), OPTIONS) as session:
        linears = [m for m in session.model.modules() if isinstance(m, StoredLinear)]
        assert len(linears) == len(session.manifest.skeleton_linears)
        assert all(isinstance(module.stored, IntegerWeight) for module in linears)
        made = generate_ids(session, [PROMPT], GenerateOptions(max_tokens=6, ignore_eos=True))
    assert len(made.token_ids[0]) == 6


@pytest.mark.skipif(not is_native(), reason="torch's products may change with its threads")
@pytest.mark.parametrize("skeleton_bits", ["native", "8", "4"])
@pytest.mark.parametrize("arch", ["qwen2_moe", "deepseek_v3"])
def test_threads_change_no_bit(arch: str, skeleton_bits: str, tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle(arch, "4", "bfloat16", skeleton_bits)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            options = run_options(memory="min", context=64, threads=threads)
            with open_session(bundle, options) as session:
                found.append(logits_of(session.model))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_native_bits_change_no_token(
    tiny_checkpoint: Callable[..., Path], tiny_bundle: TinyBundle
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint("qwen2_moe", dtype="bfloat16"),
        dtype=torch.float32,
        experts_implementation="eager",
    ).eval()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        wanted = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
    with open_session(tiny_bundle("qwen2_moe", dtype="bfloat16"), OPTIONS) as session:
        made = generate_ids(session, [PROMPT], GenerateOptions(max_tokens=24))
    assert list(made.token_ids[0]) == wanted[0, len(PROMPT) :].tolist()


def held(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Every tensor that the model computes from."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if not isinstance(module, StoredLinear | StoredEmbedding):
            continue
        if isinstance(module.stored, FloatWeight):
            yield module.stored.values
        else:
            yield from (*module.stored.planes, module.stored.scales)


def held_bytes(session: Session) -> int:
    """Bytes of storage, each counted once; buffers that no checkpoint holds are left out."""
    computed = {id(b) for _, b in session.model.named_non_persistent_buffers()}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in held(session.model)
        if id(tensor) not in computed
    }
    return sum(storages.values())


@pytest.mark.parametrize("skeleton_bits", ["native", "8", "4"])
@pytest.mark.parametrize("arch", TINY)
def test_memory_is_that_of_the_stored_bytes(
    arch: str, skeleton_bits: str, tiny_bundle: TinyBundle
) -> None:
    bundle = tiny_bundle(arch, dtype="bfloat16", skeleton_bits=skeleton_bits)
    stored = load_file(bundle / "skeleton-00001.safetensors")
    with open_session(bundle, OPTIONS) as session:
        found = held_bytes(session)
        line = next(line for line in session.plan.memory.lines if line.name == "skeleton")
    assert line.size_bytes == found
    # Norms, biases, routers and one-output gates become the float32 that is computed with.
    whole = [t for name, t in stored.items() if is_widened(name, t)]
    assert found == sum(t.nbytes for t in stored.values()) + sum(2 * t.numel() for t in whole)
    assert sum(t.numel() for t in whole) < 12_000 < sum(t.numel() for t in stored.values())


def is_widened(name: str, tensor: torch.Tensor) -> bool:
    words = (".gate.", ".router.", ".wg.", "shared_expert_gate", "correction_bias")
    small = tensor.ndim == 1 or any(word in name for word in words)
    return tensor.dtype == torch.bfloat16 and small


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", TIED)
def test_a_tied_head_shares_the_table_unless_it_has_codes(
    arch: str, dtype: str, tiny_bundle: TinyBundle
) -> None:
    with open_session(tiny_bundle(arch, dtype=dtype), OPTIONS) as session:
        head, table = session.model.lm_head, session.model.get_input_embeddings()
        if dtype == "float32":
            assert type(head) is nn.Linear and head.weight is table.weight
        else:
            assert isinstance(head, StoredLinear) and head.stored is table.stored
    with open_session(tiny_bundle(arch, dtype=dtype, skeleton_bits="8"), OPTIONS) as session:
        head, table = session.model.lm_head, session.model.get_input_embeddings()
        assert isinstance(head, StoredLinear) and isinstance(head.stored, IntegerWeight)
        assert torch.equal(dequantize(head.stored), dequantize(quantize(table.weight, 8)))


@pytest.mark.parametrize("skeleton_bits", ["native", "8"])
@pytest.mark.parametrize("names", ["head alone", "both"])
def test_a_tied_pair_is_found_under_either_name(
    names: str, skeleton_bits: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("granitemoe", "bfloat16"), tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = table.clone()
    if names == "head alone":
        del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = LocatedModel(folder=folder, name="tied")
    pack_bundle(model, out=tmp_path / "b", skeleton_bits=skeleton_bits)
    with open_session(tmp_path / "b", OPTIONS) as session:
        found = session.model.get_input_embeddings()
        assert torch.equal(found.weight, table.float())
        if skeleton_bits == "native":
            assert session.model.lm_head.stored is found.stored
        assert logits_of(session.model).isfinite().all()
