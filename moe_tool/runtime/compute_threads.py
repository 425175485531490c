"""Number of threads that compute a forward, in the kernels and in torch."""

import os
from dataclasses import dataclass

import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.experts.linear import FEW_TOKENS
from moe_tool.native.kernels import is_native, set_threads
from moe_tool.native.lookup_choice import choose_lookup


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeThreads:
    """Threads of a session. Setting them changes the whole process."""

    n_threads: int
    kernels_decode: bool
    """Whether the kernels compute every expert in a forward of a few tokens"""

    def begin(self) -> None:
        """Give all threads to the kernels and to torch; the first call also chooses the kernels."""
        set_threads(self.n_threads)
        choose_lookup()
        torch.set_num_threads(self.n_threads)

    def before_forward(self, n_tokens: int) -> None:
        """Leave torch one thread where the kernels do the work.

        Torch's threads spin after their part of an operation, on the cores that the kernels'
        threads need next: on two cores, two of each took twice as long as two kernel threads
        beside one of torch.

        Args:
            n_tokens: tokens of the coming forward, all sequences together.
        """
        wanted = 1 if self.kernels_decode and n_tokens <= FEW_TOKENS else self.n_threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


def choose_threads(asked: int | None, manifest: BundleManifest) -> ComputeThreads:
    """Return the threads of a session, which do not depend on the memory budget: a result must not.

    Args:
        asked: `--threads`. None: one per core; one less where torch, whose threads spin while they
            wait, computes the experts, so that a core is left to the readers.
        manifest: manifest of the bundle.
    """
    n_cores = len(os.sched_getaffinity(0))
    # torch computes float32 matrices at any number of tokens.
    has_float32 = manifest.shape.dtype == "float32" and any(
        table.precision.kind == "native" for table in manifest.primaries
    )
    kernels_decode = is_native() and not has_float32
    n_default = n_cores if kernels_decode else max(1, n_cores - 1)
    return ComputeThreads(n_threads=asked or n_default, kernels_decode=kernels_decode)
