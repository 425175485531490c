"""Table of a MoLE's experts that stays on disk, as the module that the model looks rows up in."""

import time

import torch
from torch import nn

from moe_tool.formats.bundle_checks import corrupt_bundle
from moe_tool.formats.lookup_bundle import LookupBundle
from moe_tool.formats.table_rows import TableRows
from moe_tool.models.mole.load_mole import build_mole, check_tensors, load_tensors
from moe_tool.models.mole.modeling import MoleForCausalLM
from moe_tool.quantization.row_codes import RowCodes

BLOCK_BYTES = 2**20
"""Size of the float32 rows that are read and decoded at once"""


class DiskRows(nn.Module):
    """Lookup of rows [U, L * N * d] by distinct ids [U], ascending; adjacent ones in one read."""

    def __init__(self, rows: TableRows, codes: RowCodes) -> None:
        super().__init__()
        self.rows, self._codes = rows, codes
        self.seconds = 0.0
        """Time that reads of rows took, their check included"""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 [U, L * N * d].

        Raises:
            IndexError: an id is outside the table.
            CorruptArtifactError, StorageError: as `TableRows.read`.
        """
        if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < self.rows.n_rows:
            raise IndexError(f"the table has rows 0 to {self.rows.n_rows - 1}")
        n_block = max(1, BLOCK_BYTES // (4 * self._codes.width))
        out = torch.empty(len(ids), self._codes.width)
        for begin in range(0, len(ids), n_block):
            start = time.perf_counter()
            raw = self.rows.read_bytes(ids[begin : begin + n_block])
            self.seconds += time.perf_counter() - start
            out[begin : begin + len(raw)] = self._codes.decode(raw)
        return out


def load_model(bundle: LookupBundle) -> tuple[MoleForCausalLM, DiskRows]:
    """Load a bundle's model in float32 without its table, of which it reads rows.

    The caller closes the rows.

    Raises:
        CorruptArtifactError: configuration, tensors and table do not fit together, or are damaged.
        StorageError: the disk does not give them.
    """
    model = checked_model(bundle)
    with bundle.open_skeleton() as checkpoint:
        load_tensors(model, checkpoint, without_table=True)
    table = DiskRows(bundle.open_rows(), bundle.codes)
    model.model.row_table = table
    return model, table


def checked_model(bundle: LookupBundle) -> MoleForCausalLM:
    """Return a bundle's model on the meta device after comparing it with headers and manifest.

    Raises:
        CorruptArtifactError: they do not fit together.
    """
    model = build_mole(bundle.folder)
    config, manifest = model.config, bundle.manifest
    pairs = {
        "vocabulary": (config.vocab_size, manifest.vocabulary),
        "layers": (config.num_hidden_layers, manifest.layers),
        "experts": (config.num_experts, manifest.experts),
        "hidden width": (config.hidden_size, manifest.hidden),
        "form of the experts": (config.experts_form, "table"),
    }
    for what, (stated, wanted) in pairs.items():
        if stated != wanted:
            raise corrupt_bundle(
                f"{bundle.folder}: config.json and manifest.json do not agree on the {what}: "
                f"{stated} and {wanted}"
            )
    with bundle.open_skeleton() as checkpoint:
        check_tensors(model, checkpoint, bundle.folder, without_table=True)
    return model
