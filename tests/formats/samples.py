"""One tiny artifact of every kind, all of one model, and where their bytes lie."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from moe_tool.artifacts.buddy_map import Buddy, BuddyMap, LayerBuddies
from moe_tool.artifacts.expert_statistics import ExpertStatistics, ProbeStatistics, RoutingCounts
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import NativePrecision, precision_from_bits
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.formats import record_plan
from moe_tool.formats.bundle_files import SkeletonEntry
from moe_tool.formats.bundle_spec import BundleSpec, planned_forms
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileHeader, write_layer_part, write_profile
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.packing.expert_coding import coded

LAYERS, EXPERTS, TOP_K = (0, 2), 3, 2
IDENTITY = ModelIdentity(name="tiny", model_type="mixtral", quick="1" * 64)
OTHER = ModelIdentity(name="another", model_type="mixtral", quick="2" * 64)
SHAPE = MoeShape(
    model_type="mixtral",
    n_decoder_layers=3,
    layers=LAYERS,
    experts=EXPERTS,
    top_k=TOP_K,
    hidden=5,
    vocabulary=7,
    dtype="bfloat16",
    expert_tensors=(
        ExpertTensor(name="gate_up_proj", shape=(4, 5)),
        ExpertTensor(name="gate_up_proj_bias", shape=(4,)),
        ExpertTensor(name="down_proj", shape=(5, 2)),
    ),
)
ORDER = [(layer, expert) for layer in LAYERS for expert in (1, 0, 2)]
MADE_FROM = {"bits": "8", "profile": "none", "buddies": "none"}
N, S, D = 2, 4, 1


def expert(layer: int, expert_id: int) -> dict[str, torch.Tensor]:
    """Return one expert's weights."""
    generator = torch.Generator().manual_seed(10 * layer + expert_id)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(torch.bfloat16)
        for tensor in SHAPE.expert_tensors
    }


def make_checkpoint(folder: Path) -> Path:
    """Write model.safetensors with two tensors."""
    folder.mkdir(parents=True)
    tensors = {"embed": torch.arange(6.0).view(2, 3), "norm": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_sharded(folder: Path) -> Path:
    """Write two shards of one tensor each, with their index."""
    folder.mkdir(parents=True)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    save_file({"a": torch.zeros(2)}, folder / shards["a"])
    save_file({"b": torch.ones(3)}, folder / shards["b"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def open_writer(out: Path, *, bits: str = "8", **changed: Any) -> BundleWriter:
    """Begin or resume the tiny bundle."""
    arguments: dict[str, Any] = {
        "identity": IDENTITY,
        "shape": SHAPE,
        "order": tuple(ORDER),
        "forms": planned_forms({precision_from_bits(bits): ORDER}),
        "made_from": MADE_FROM,
    }
    return BundleWriter.open(out, BundleSpec(**(arguments | changed)))


def write_bundle(out: Path, source: Path, **changed: Any) -> None:
    """Write the tiny bundle to its end, from where an earlier attempt left it."""
    writer = open_writer(out, **changed)
    if not writer.finished:
        for layer, expert_id in ORDER[writer.n_written :]:
            weights = coded(expert(layer, expert_id), writer.spec.forms[0].precision)
            record = writer.forms[0].encode(weights)
            writer.write_record(0, layer, expert_id, record)
        with Checkpoint.open_folder(source) as checkpoint:
            entries = [
                SkeletonEntry(name=i.name, dtype=i.dtype, shape=i.shape, size_bytes=i.size_bytes)
                for i in checkpoint.tensors.values()
            ]
            writer.write_skeleton(
                entries,
                lambda name: (checkpoint.read_bytes(name),),
                precision=NativePrecision(),
                linears=(),
            )
        writer.add_file("config.json", b"{}\n")
    writer.finish(heat=None, buddies=None, profile_sha256=None)


def small_files(monkeypatch: Any) -> None:
    """Two records to a file, so that six records take three."""
    monkeypatch.setattr(record_plan, "MAX_FILE_BYTES", 2 * 5 * 4096)


def make_buddies(path: Path, identity: ModelIdentity = IDENTITY) -> Path:
    """Write a buddy map: everybody's stand-in is the next expert."""
    layers = tuple(
        LayerBuddies(
            layer=layer,
            entropy_threshold=0.5,
            buddies=tuple((_buddy((e + 1) % EXPERTS),) for e in range(EXPERTS)),
            clusters=(0, 0, 1),
        )
        for layer in LAYERS
    )
    made = BuddyMap(
        tool_version="0",
        identity=identity,
        profile_sha256="3" * 64,
        by="output",
        k=1,
        layers=layers,
    )
    write_json_artifact(path, made)
    return path


def _buddy(expert_id: int) -> Buddy:
    return Buddy(expert=expert_id, similarity=0.5, scale=1.0, price=0.25, price_held_out=0.5)


def make_profile(path: Path, identity: ModelIdentity = IDENTITY) -> Path:
    """Write a profile of two sequences of four tokens."""
    parts = {}
    for position, layer in enumerate(LAYERS):
        parts[layer] = path.with_name(f"{path.name}.{layer}.part.h5")
        write_layer_part(
            parts[layer], layer, trace(len(LAYERS) - 1 - position, layer), statistics(layer)
        )
    write_profile(
        path,
        header(identity),
        tokens(),
        parts,
        {layer: 0.5 for layer in LAYERS},
        sensitivity_n_tokens=8,
    )
    for part in parts.values():
        part.unlink()
    return path


def header(identity: ModelIdentity = IDENTITY) -> ProfileHeader:
    """Return the profile's header."""
    return ProfileHeader(
        identity=identity,
        shape=SHAPE,
        tokenizer_sha256="4" * 64,
        sources=("words=./words.txt",),
        seed=0,
        seq_len=S,
        holdout=0.5,
        tool_version="0",
    )


def tokens() -> TracedTokens:
    """Return the profile's tokens."""
    return TracedTokens(
        ids=(np.arange(N * S).reshape(N, S) % SHAPE.vocabulary).astype(np.int32),
        domain=np.zeros(N, np.int16),
        document=np.zeros((N, S), np.int32),
        held_out=np.array([False, True]),
        domains=("words",),
    )


def trace(depth: int, seed: int = 0) -> LayerTrace:
    """Return one layer's routing of eight tokens."""
    random = np.random.default_rng(seed)
    index = np.argsort(random.random((N * S, EXPERTS)), axis=1)[:, :TOP_K].astype(np.uint16)
    return LayerTrace(
        top_k_index=index,
        top_k_weight=np.full((N * S, TOP_K), 0.5, np.float16),
        router_logits=random.normal(size=(N * S, EXPERTS)).astype(np.float16),
        selection_score=None,
        next_gate_index=np.repeat(index[None], depth, axis=0),
    )


def statistics(seed: int = 0) -> ExpertStatistics:
    """Return one layer's statistics; the numbers mean nothing."""
    random = np.random.default_rng(seed)
    e = EXPERTS

    def floats(*shape: int) -> np.ndarray:
        return random.random(shape).astype(np.float32)

    def counts(*shape: int) -> np.ndarray:
        return random.integers(0, 9, shape)

    def routing() -> RoutingCounts:
        return RoutingCounts(
            n_tokens=4,
            load=counts(e),
            gate_sum=random.random(e),
            coactivation=counts(e, e),
            domain_load=counts(D, e),
            same_as_previous=0.25,
        )

    def probe() -> ProbeStatistics:
        return ProbeStatistics(
            n_sampled=4,
            n_cka=4,
            n_routed=counts(e),
            fell_back=np.array([True, False, False]),
            output_norm=floats(e),
            output_ratio=floats(e),
            cosine=floats(e, e),
            cka=floats(e, e),
            scale=floats(e, e),
            eps_buddy=floats(e, e),
            eps_drop=floats(e),
        )

    return ExpertStatistics(
        in_sample=routing(),
        held_out=routing(),
        probe=probe(),
        probe_held_out=probe(),
        eps_buddy_transferred=floats(e, e),
        eps_bits=floats(e, 5),
        eps_bits_n_tokens=counts(e),
        router_similarity=floats(e, e),
        sensitivity=0.0,
        sensitivity_n_tokens=0,
    )


def tree_hash(root: Path) -> dict[str, str]:
    """Return what lies below a folder: names, kinds, links' targets, hashes of files."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found
