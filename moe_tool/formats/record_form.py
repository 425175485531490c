"""Protocol of the forms of an expert: how a record is written, read and checked."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from moe_tool.artifacts.form_table import Role
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.formats.channel_form import ChannelForm
from moe_tool.formats.expert_form import expert_form, low_rank_form
from moe_tool.formats.kept_form import KeptForm
from moe_tool.formats.record_layout import RecordLayout
from moe_tool.formats.selector_form import SelectorForm

Content = TypeVar("Content")


class RecordForm(Protocol[Content]):
    """Encoding of the records of one table."""

    @property
    def layout(self) -> RecordLayout:
        """Segments of a record"""

    def encode(self, content: Content) -> torch.Tensor:
        """Return a record, uint8 [layout.size_bytes]; the same content gives the same bytes."""

    def decode(self, record: torch.Tensor) -> Content:
        """Return the content of a record as views into it."""

    def require_finite(self, record: torch.Tensor) -> None:
        """Refuse a record with NaN or infinity in scales, thresholds or a map.

        Raises:
            CorruptArtifactError: names the segment.
        """


_Make = Callable[[MoeShape, Any], RecordForm[Any]]
_FORMS: Mapping[str, _Make] = {
    "native": expert_form,
    "kept": KeptForm.of,
    "integer": expert_form,
    "low-rank": low_rank_form,
    "channels": ChannelForm.of,
}


def record_form(
    shape: MoeShape, precision: AnyPrecision, role: Role = "primary"
) -> RecordForm[Any]:
    """Return the form of the records of a table.

    Raises:
        CorruptArtifactError: channels of a model whose experts have none, or kept codes of 4 bits
            in rows of an odd length.
    """
    make: _Make = SelectorForm.of if role == "selector" else _FORMS[precision.kind]
    return make(shape, precision)
