"""Output of those experts of a layer call that were in memory when it began."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from moe_tool.quantization.weights import ExpertWeights

Supplied = Iterator[tuple[int, ExpertWeights]]


class PartialSum:
    """Sum of the outputs of a call's experts that need no read, handed on before the others arrive.

    Which experts these are is settled before the call, and they are added in ascending order, so
    that the sum does not depend on the timing of reads.
    """

    def __init__(
        self, hidden: torch.Tensor, there: np.ndarray, then: Callable[[torch.Tensor], None]
    ) -> None:
        """Begin a call.

        Args:
            hidden: input of the experts, [T, H].
            there: experts by their numbers in the call that need no read, bool.
            then: called once with the sum, [T, H].
        """
        self._hidden, self._there, self._then = hidden, there, then
        self._outputs: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def add(self, expert: int, rows: torch.Tensor | None, output: torch.Tensor) -> None:
        """Take an expert's output times its gate weights, as `combine.Watch`."""
        if self._there[expert]:
            self._outputs[expert] = rows, output

    def follow(self, supplied: Supplied, wanted: list[int]) -> Supplied:
        """Pass on a call's experts; hand the sum on when the last one that needs no read was
        computed, before the next one is waited for."""
        n_there = sum(bool(self._there[expert]) for expert in wanted)
        is_done = False
        while True:
            if not is_done and len(self._outputs) == n_there:
                is_done = True
                self._then(self._take())
            supply = next(supplied, None)
            if supply is None:
                return
            yield supply

    def _take(self) -> torch.Tensor:
        total = torch.zeros_like(self._hidden)
        for _, (rows, output) in sorted(self._outputs.items(), key=lambda item: item[0]):
            if rows is None:
                total.add_(output)
            else:
                total.index_add_(0, rows, output.to(total.dtype))
        self._outputs.clear()
        return total
