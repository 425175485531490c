"""No bundle gets its name before a forward through it gave what the checkpoint gives."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_tool.errors import BudgetError, CorruptArtifactError
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.packing import prove_bundle, skeleton_work, write_records
from moe_tool.packing.pack_memory import plan_pack_memory
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from tests.packed import pack_bundle
from tests.packing.test_pack_bundle import located, profile_of
from tests.packing.test_pack_mixtures import mixed

IDS = torch.tensor([[52, 104, 156, 208]])  # fifths of the 260 of tests/tiny_models.py


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("mixtral", "float32"), ("gpt_oss", "bfloat16"), ("granitemoe", "bfloat16")],
)
def test_native_bundles_give_every_bit(
    arch: str, dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    proof = pack_bundle(located(tiny_checkpoint(arch, dtype)), out=tmp_path / "b").proof
    assert proof is not None
    assert (proof.rule, proof.difference, proof.kl, proof.tokens) == ("equal", 0.0, 0.0, 4)
    report = pack_bundle(located(tiny_checkpoint(arch, dtype)), out=tmp_path / "b")
    assert report.proof is None  # nothing was written


FORMS: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"bits": "4"}, "bounded"),
    ("granitemoe", {"skeleton_bits": "8"}, "bounded"),
    ("deepseek_v3", {"bits": "8", "skeleton_bits": "4"}, "bounded"),
    ("gpt_oss", {"bits": "2+2", "profile": True}, "bounded"),
    ("mixtral", {"sparse_experts": "gate3", "profile": True}, "bounded"),
    ("mixtral", {"plan": True, "profile": True}, "finite"),  # 1 bit, and a removed expert
]


@pytest.mark.parametrize(("arch", "options", "rule"), FORMS)
def test_the_divergence_is_that_of_a_run_from_transformers(
    arch: str,
    options: dict[str, Any],
    rule: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tiny_checkpoint(arch)
    given = dict(options)
    if given.pop("profile", False):
        given["profile"] = profile_of(folder, tmp_path / "p.h5")
    if given.pop("plan", False):
        opened = open_model(located(folder))
        with opened.checkpoint:
            given["plan"] = mixed(opened)
    report = pack_bundle(located(folder), out=tmp_path / "b", **given)
    assert report.proof is not None and report.proof.rule == rule
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = run_options(memory="50%", context=16)
    with open_session(tmp_path / "b", options) as session, torch.inference_mode():
        wanted = model(input_ids=IDS).logits[0].double().log_softmax(-1)
        found = session.model(input_ids=IDS).logits[0].double().log_softmax(-1)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    assert report.proof.kl == pytest.approx(kl, rel=1e-3)
    assert report.proof.kl > 1e-7


def test_only_a_layer_of_the_skeleton_and_used_experts_are_read(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("mixtral", "bfloat16")
    proof = pack_bundle(located(folder), out=tmp_path / "b").proof
    opened = open_model(located(folder))
    with opened.checkpoint:
        skeleton = sum(
            opened.checkpoint.tensors[n].size_bytes for n in opened.skeleton.tensor_names
        )
    expert = 3 * 64 * 48 * 2
    least, most = skeleton + 3 * 2 * expert, skeleton + 3 * 8 * expert  # layers, experts
    assert proof is not None
    assert 2 * least <= proof.bytes_read <= 2 * most + 3 * 8 * 4096  # records end aligned


def scaled(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name: FloatWeight(values=weight.values * 1.5) for name, weight in weights.items()}


def test_wrong_records_are_refused_with_the_layer_and_a_resume_writes_the_rest(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of layer 1 on are wrong, with hashes that fit: only the forward can tell."""
    coded, model = write_records.coded, located(tiny_checkpoint("mixtral"))
    made: list[int] = []

    def wrong(*args: Any) -> Mapping[str, Any]:
        made.append(0)
        return coded(*args) if len(made) <= 8 else scaled(coded(*args))

    with monkeypatch.context() as patched:
        patched.setattr(write_records, "coded", wrong)
        with pytest.raises(CorruptArtifactError, match="layer 1 is the first that differs") as info:
            pack_bundle(model, out=tmp_path / "b")
    assert info.value.exit_code == 3
    assert info.value.hint is not None and f"remove {tmp_path / 'b.part'}" in info.value.hint
    assert not (tmp_path / "b").exists()
    with pytest.raises(CorruptArtifactError, match="layer 1 is the first that differs"):
        pack_bundle(model, out=tmp_path / "b")  # its records are as they were
    shutil.rmtree(tmp_path / "b.part")
    assert pack_bundle(model, out=tmp_path / "b").resumed_records == 0


def test_a_wrong_head_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = skeleton_work.SkeletonWork._read

    def wrong(self: skeleton_work.SkeletonWork, name: str) -> Iterator[bytes]:
        for piece in read(self, name):
            values = torch.frombuffer(bytearray(piece), dtype=torch.float32)
            yield (values * (2 if name == "lm_head.weight" else 1)).numpy().tobytes()

    monkeypatch.setattr(skeleton_work.SkeletonWork, "_read", wrong)
    with pytest.raises(CorruptArtifactError, match="the head is the first that differs; .* 1 "):
        pack_bundle(located(tiny_checkpoint("mixtral")), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("factor", "message"),
    [(-1e3, r"nats per token away, where knowing nothing is 5\.56"), (6e4, "not finite")],
)
def test_rounded_weights_may_not_be_worse_than_knowing_nothing(
    factor: float,
    message: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert math.log(260) == pytest.approx(5.56, abs=0.005)
    made = skeleton_work._quantize

    def wrong(weight: torch.Tensor, precision: Any) -> IntegerWeight:
        is_head = weight.shape[0] == 260 or factor > 0
        return made(weight * factor if is_head else weight, precision)

    monkeypatch.setattr(skeleton_work, "_quantize", wrong)
    folder = Path(shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "m"))
    if factor > 0:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"].fill_(1e36)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptArtifactError, match=message) as caught:
        pack_bundle(located(folder), out=tmp_path / "b", skeleton_bits="8")
    assert caught.value.hint is not None and "more bits" in caught.value.hint
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_that_overflows_is_not_packed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptArtifactError, match="layer 1 of broken gives numbers that are not"):
        pack_bundle(LocatedModel(folder=folder, name="broken"), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_proof_counts_in_the_budget(tiny_checkpoint: Callable[..., Path]) -> None:
    opened = open_model(located(tiny_checkpoint("mixtral")))
    with opened.checkpoint:
        plain = plan_pack_memory(opened, n_tokens=0, asked=None).needed_bytes
        whole = plan_pack_memory(opened, n_tokens=0, in_turn_bytes=2**30, asked=None).needed_bytes
        assert whole - plain + 2**24 > 2**30 and whole > plain
        with pytest.raises(BudgetError):
            plan_pack_memory(opened, n_tokens=0, in_turn_bytes=2**30, asked=plain)


@pytest.mark.parametrize("arch", ["mixtral", "granitemoe", "deepseek_v3"])
def test_a_forward_in_turn_is_the_forward_and_holds_one_layer(
    arch: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(arch, "bfloat16")
    opened = open_model(located(folder))
    with opened.checkpoint as checkpoint:
        whole = SkeletonLoader(folder, checkpoint).load()
        whole.set_experts_function(lambda call: prove_bundle._by_source(opened, call))
        with torch.no_grad():
            wanted = whole.model(input_ids=IDS, use_cache=False).logits
        loader = SkeletonLoader(folder, checkpoint)
        most, held = loader.in_turn_bytes() - loader.largest_bytes, list[int]()
        skeleton = loader.load_in_turn()
        skeleton.set_experts_function(lambda call: prove_bundle._by_source(opened, call))
        parts = [
            *skeleton.model.modules(),
            *(p for m in skeleton.layers for p in m.block.modules()),
        ]

        def count(layer: object, args: object) -> None:
            tensors = [p for part in {*parts, *skeleton.model.modules()} for p in part.parameters()]
            stored = [m.stored.values for m in skeleton.model.modules() if hasattr(m, "stored")]
            each = {t.data_ptr(): t.nbytes for t in (*tensors, *stored) if not t.is_meta}
            held.append(sum(each.values()))

        for layer in skeleton.model.model.layers:
            layer.register_forward_pre_hook(count)
        with torch.no_grad():
            found = skeleton.model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(found, wanted)
    assert len(held) == 3 and max(held) <= most
    assert max(held) < loader.held_bytes
    count(None, ())
    assert held.pop() == 0
