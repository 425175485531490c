"""Bundles of a quantized checkpoint's codes: byte for byte those on disk, and the same tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.native import kernels
from moe_tool.quantization.kept_codes import KeptWeight
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids, run_setup
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from tests.models.stored_formats.test_coded_models import MODELS, N_TOKENS, PROMPT, write_pair
from tests.packed import pack_bundle

NAMES = {
    "fp8": "fp8",
    "mxfp4": "mxfp4",
    "int4": "int4-g32",
    "nvfp4": "nvfp4",
    "gptq": "int4-g32-zeros",
    "awq": "int4-g32-zeros",
    "mlx": "int4-g32-biases",
    "nf4": "nf4",
    "int8": "int8",
}


@pytest.fixture(scope="module", params=MODELS)
def packed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LocatedModel, Path, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    coded, plain = write_pair(request.param, folder)
    model = LocatedModel(folder=coded, name=request.param)
    yield request.param, model, plain, pack_bundle(model, out=folder / "b", bits="native").bundle


def kept_expert(reader: BundleReader, layer: int, expert: int) -> ExpertWeights:
    (held,) = reader.forms
    record = torch.zeros(held.record_size_bytes, dtype=torch.uint8)
    reader.read_record_into(layer, expert, record, form=0)
    weights: ExpertWeights = held.form.decode(record)
    return weights


def tokens_of(bundle: Path, memory: str) -> list[int]:
    options = run_options(memory=memory, context=64, prompt_tokens=32)
    with open_session(bundle, options) as session:
        generate = GenerateOptions(max_tokens=N_TOKENS, ignore_eos=True)
        return list(generate_ids(session, [PROMPT], generate).token_ids[0])


def wanted_tokens(plain: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        mask = torch.ones_like(ids)
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=N_TOKENS, do_sample=False
        )
    return found[0, len(PROMPT) :].tolist()  # type: ignore[no-any-return]


def test_tokens_are_the_plain_models_whatever_is_resident(
    packed: tuple[str, LocatedModel, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, plain, bundle = packed
    wanted = wanted_tokens(plain)
    assert tokens_of(bundle, "min") == tokens_of(bundle, "100%") == wanted
    monkeypatch.setattr(kernels, "kernels_in_use", lambda: "torch")
    assert tokens_of(bundle, "min") == wanted


def test_every_expert_is_kept_as_the_floats_that_were_read(
    packed: tuple[str, LocatedModel, Path, Path],
) -> None:
    name, model, _, bundle = packed
    opened = open_model(model)
    with BundleReader.open(bundle) as reader:
        (held,) = reader.forms
        assert held.table.precision.kind == "kept" and held.table.name == NAMES[name]
        for layer, expert in sorted(held.table.experts):
            kept = kept_expert(reader, layer, expert)
            for tensor, floats in opened.experts.read(layer, expert).items():
                weight = kept[tensor]
                decoded = weight.decode() if isinstance(weight, KeptWeight) else weight.part("")
                assert torch.equal(decoded, floats)
    opened.checkpoint.close()


def test_codes_are_the_bytes_on_disk(packed: tuple[str, LocatedModel, Path, Path]) -> None:
    """gpt-oss's matrices are not even joined."""
    name, model, _, bundle = packed
    if name != "mxfp4":
        pytest.skip("gate and up are joined")
    stored = load_file(model.folder / "model.safetensors")
    with BundleReader.open(bundle) as reader:
        kept = kept_expert(reader, 1, 5)
    on_disk = "model.layers.1.mlp.experts.{}_{}"
    for tensor in ("gate_up_proj", "down_proj"):
        blocks = stored[on_disk.format(tensor, "blocks")][5]
        assert torch.equal(kept[tensor].part("codes").flatten(), blocks.flatten())
        scales = stored[on_disk.format(tensor, "scales")][5]
        assert torch.equal(kept[tensor].part("scale"), scales)


class Notes:
    """Remembers notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, *_: object) -> None: ...
    def advance(self, *_: object) -> None: ...
    def end(self) -> None: ...
    def note(self, text: str) -> None:
        self.lines.append(text)


def test_int8_activations_are_announced_and_close(
    packed: tuple[str, LocatedModel, Path, Path],
) -> None:
    name, _, _, bundle = packed
    options = {"memory": "min", "context": 64, "prompt_tokens": 32}
    if name in ("fp8", "nf4"):
        with pytest.raises(UsageError, match="changes nothing"):
            open_session(bundle, run_options(activations="int8", **options))
        return
    logits = {}
    for activations in ("float32", "int8"):
        notes = Notes()
        chosen = run_options(activations=activations, **options)
        with open_session(bundle, chosen, progress=notes) as session, torch.inference_mode():
            logits[activations] = session.model(input_ids=torch.tensor([PROMPT])).logits
            assert run_setup(session).activations == activations
        announced = [line for line in notes.lines if "int8 activations" in line]
        assert len(announced) == (activations == "int8")
    wanted, found = logits["float32"], logits["int8"]
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert 0 < error < 0.1
    with open_session(bundle, run_options(**options)) as session, torch.inference_mode():
        assert torch.equal(session.model(input_ids=torch.tensor([PROMPT])).logits, wanted)


def test_experts_that_differ_in_form_are_packed_decoded(tmp_path: Path) -> None:
    coded, plain = write_pair("int4", tmp_path)
    path = coded / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    tensors[name] = tensors[name].float()  # the same numbers, unlike the scales of its gate
    save_file(tensors, path, {"format": "pt"})
    model = LocatedModel(folder=coded, name="int4")
    bundle = pack_bundle(model, out=tmp_path / "b", bits="native").bundle
    with BundleReader.open(bundle) as reader:
        (held,) = reader.forms
        assert held.table.precision.kind == "native"
    assert tokens_of(bundle, "min") == wanted_tokens(plain)
