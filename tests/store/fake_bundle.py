"""A bundle in memory whose reads can be slowed, held back and made to fail."""

import threading
import time
from types import SimpleNamespace

import torch

from moe_tool.artifacts.moe_shape import ExpertTensor
from moe_tool.artifacts.precision import NativePrecision
from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.bundle_checks import BundleLevel
from moe_tool.formats.expert_form import ExpertForm
from moe_tool.formats.expert_record import record_layout

SIDE = 32
"""An expert is one [32, 32] float32 matrix, 4096 bytes, full of its own `tag`."""
RECORD_BYTES = 4 * SIDE * SIDE


def tag(layer, expert):
    """Return the number that fills an expert's matrix."""
    return 1000.0 * layer + expert + 1


class FakeBundle:
    """Stands in for a BundleReader."""

    def __init__(self, *, layers=(0, 1), experts=4, file_order=None):
        tensors = (ExpertTensor(name="up_proj", shape=(SIDE, SIDE)),)
        order = file_order or [(layer, expert) for layer in layers for expert in range(experts)]
        self.manifest = SimpleNamespace(
            shape=SimpleNamespace(layers=tuple(layers), experts=experts, expert_tensors=tensors),
            precision=NativePrecision(),
            records=tuple(SimpleNamespace(layer=layer, expert=expert) for layer, expert in order),
            record_size_bytes=RECORD_BYTES,
        )
        form = ExpertForm(
            precision=NativePrecision(),
            tensors=tensors,
            layout=record_layout(tensors, "float32", NativePrecision()),
            stem="experts",
        )
        self.levels = (BundleLevel(form=form, records=self.manifest.records),)
        self.delay_s = {}
        self.held_back = {}
        self.broken = set()
        self.started = []
        self.given_up = []
        self.has_started = threading.Event()

    def hold_back(self, layer, expert):
        """Let reads of this expert wait for the event returned."""
        return self.held_back.setdefault((layer, expert), threading.Event())

    def read_record_into(self, layer, expert, out, *, level=0, n_there=0, go_on=None):
        """Fill `out` in two halves with a pause between, so that a torn read shows."""
        self.started.append((layer, expert))
        self.has_started.set()
        values = out.view(torch.float32)
        half = values.numel() // 2
        values[:half] = tag(layer, expert)
        if (layer, expert) in self.held_back:
            assert self.held_back[layer, expert].wait(600)
        time.sleep(self.delay_s.get((layer, expert), 0))
        if (layer, expert) in self.broken:
            raise CorruptArtifactError(f"layer {layer} expert {expert} is damaged")
        if go_on is not None and not go_on(RECORD_BYTES // 2):
            self.given_up.append((layer, expert))
            return
        values[half:] = tag(layer, expert)
        if go_on is not None:
            go_on(RECORD_BYTES // 2)
