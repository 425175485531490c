"""A bundle in memory whose reads can be slowed, held back and made to fail."""

import threading
import time
from types import SimpleNamespace

import torch

from moe_tool.artifacts.moe_shape import ExpertTensor, MoeShape
from moe_tool.artifacts.precision import ChannelPrecision, NativePrecision
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_checks import BundleForm
from moe_tool.formats.record_form import record_form

SIDE = 32
"""An expert is one [32, 32] float32 matrix, 4096 bytes, full of its own `tag`."""
RECORD_BYTES = 4 * SIDE * SIDE
NATIVE = (ExpertTensor(name="up_proj", shape=(SIDE, SIDE)),)
GATED = (
    ExpertTensor(name="gate_up_proj", shape=(2 * SIDE, SIDE)),
    ExpertTensor(name="down_proj", shape=(SIDE, SIDE)),
)
CHANNELS = ChannelPrecision(selected_by="up", selector_bits=2)


def tag(layer, expert, form=0):
    """Return the number that fills an expert's matrix."""
    return 1000.0 * layer + expert + 1 + 100 * form


class FakeBundle:
    """Stands in for a BundleReader.

    Its tables are (role, precision, keys); every number of a record is the expert's `tag`, but for
    selectors, whose bytes are 0.
    """

    def __init__(self, *, layers=(0, 1), experts=4, file_order=None, tables=None):
        order = file_order or [(layer, expert) for layer in layers for expert in range(experts)]
        tables = tables or [("primary", NativePrecision(), order)]
        is_native = all(precision.kind == "native" for _, precision, _ in tables)
        shape = MoeShape(
            model_type="mixtral",
            n_decoder_layers=max(layers) + 1,
            layers=tuple(layers),
            experts=experts,
            top_k=1,
            hidden=SIDE,
            vocabulary=8,
            dtype="float32",
            expert_tensors=NATIVE if is_native else GATED,
        )
        self.forms = ()
        for role, precision, keys in tables:
            form = record_form(shape, precision, role)
            table = SimpleNamespace(
                role=role,
                precision=precision,
                record_size_bytes=form.layout.size_bytes,
                records=tuple(SimpleNamespace(layer=layer, expert=e) for layer, e in keys),
                size_bytes=len(keys) * form.layout.size_bytes,
            )
            self.forms += (BundleForm(index=len(self.forms), table=table, form=form),)
        self.manifest = SimpleNamespace(shape=shape)
        self.delay_s = {}
        self.held_back = {}
        self.broken = set()
        self.started = []
        self.given_up = []
        self.has_started = threading.Event()

    def hold_back(self, layer, expert):
        """Let reads of this expert wait for the event returned."""
        return self.held_back.setdefault((layer, expert), threading.Event())

    def read_record_into(self, layer, expert, out, *, form=0, n_there=0, go_on=None):
        """Fill `out` in two halves with a pause between, so that a torn read shows."""
        if self.forms[form].table.role == "selector":
            out.zero_()
            return
        self.started.append((layer, expert))
        self.has_started.set()
        values = out.view(torch.float32)
        half = values.numel() // 2
        values[:half] = tag(layer, expert, form)
        if (layer, expert) in self.held_back:
            assert self.held_back[layer, expert].wait(600)
        time.sleep(self.delay_s.get((layer, expert), 0))
        if (layer, expert) in self.broken:
            raise CorruptArtifactError(f"layer {layer} expert {expert} is damaged")
        if go_on is not None and not go_on(out.numel() // 2):
            self.given_up.append((layer, expert))
            return
        values[half:] = tag(layer, expert, form)
        if go_on is not None:
            go_on(out.numel() // 2)


def is_whole(stored, layer, expert, form=0):
    """Return whether every number of an expert that a store handed out is its tag."""
    host = stored.to_host()
    if hasattr(host, "channels"):
        chunks = host.channels.chunks
        values = chunks.reshape(-1)[: chunks.numel() // 4 * 4].view(torch.float32)
    else:
        values = host["up_proj"].values
    return bool((values == tag(layer, expert, form)).all())
