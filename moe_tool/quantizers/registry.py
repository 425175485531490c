"""Every quantizer, one row each: `--quantizer`, docs and contract tests read them."""

from collections.abc import Mapping

from moe_tool.errors import UsageError
from moe_tool.quantizers import fitted, gptq, hqq, imatrix, mc, rtn
from moe_tool.quantizers.spec import QuantizerSpec

QUANTIZERS: Mapping[str, QuantizerSpec] = {
    spec.name: spec
    for spec in (
        rtn.SPEC,
        hqq.SPEC,
        fitted.SPEC,
        imatrix.SPEC,
        gptq.SPEC,
        mc.SPEC,
    )
}
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
