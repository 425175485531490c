"""Precision of tokens in products with kept codes: float32, or int8 where the codes allow it."""

from collections.abc import Sequence
from typing import Literal

from moe_tool.artifacts.form_table import FormTable
from moe_tool.errors import UsageError
from moe_tool.native.kept import INTEGER_KINDS

Activations = Literal["float32", "int8"]
INT8_NOTE = (
    "int8 activations: tokens are rounded to 8 bits before they meet an expert's codes, faster and "
    "not exact"
)
PRICED_NOTE = (
    "compared with the same bundle with float32 activations: KL is the price of int8 activations "
    "and of the policy together"
)


def require_activations(activations: Activations, tables: Sequence[FormTable]) -> None:
    """Refuse int8 activations where they would change nothing.

    Raises:
        UsageError: no expert is stored in codes whose products are sums of integers.
    """
    if activations == "float32":
        return
    for table in tables:
        if table.precision.kind == "kept" and table.precision.codes in INTEGER_KINDS:
            return
    names = ", ".join(sorted({table.name for table in tables}))
    raise UsageError(
        f"--activations int8 changes nothing: it is for experts in a checkpoint's own mxfp4, "
        f"nvfp4, int4 or int8 codes, and these are {names}",
        hint="leave --activations out",
    )
