"""Every quantizer, one row each: `--quantizer`, docs and contract tests read them.

The file of the same name, which loads torch, holds `make` and perhaps `refit_last`: see spec.py.
"""

from collections.abc import Mapping

from moe_tool.errors import UsageError
from moe_tool.quantizers.spec import QuantizerSpec

_ROWS = (
    QuantizerSpec(name="rtn", summary="to the nearest code", is_profiled=True),
    QuantizerSpec(
        name="hqq",
        summary="to the nearest code, with zero points robust to outliers",
        makes_zeros=True,
        source="Badri and Shaji 2023",
    ),
    QuantizerSpec(
        name="fitted",
        summary="to the nearest code, scales by least squares on the outputs",
        needs_inputs=True,
    ),
    QuantizerSpec(
        name="imatrix",
        summary="to the nearest code, scales by least squares weighted with each column's mean "
        "squared input",
        needs_inputs=True,
        source="llama.cpp's importance matrix",
    ),
    QuantizerSpec(
        name="gptq",
        summary="each column's error compensated in the remaining columns, scales by least squares "
        "on the outputs",
        needs_inputs=True,
        source="arXiv:2210.17323",
    ),
)
QUANTIZERS: Mapping[str, QuantizerSpec] = {spec.name: spec for spec in _ROWS}
"""Specs by the name that `--quantizer` takes"""


def parse_quantizer(name: str) -> QuantizerSpec:
    """Return the quantizer of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in QUANTIZERS:
        raise UsageError(
            f"--quantizer {name} is not known", hint=f"use one of {', '.join(QUANTIZERS)}"
        )
    return QUANTIZERS[name]
