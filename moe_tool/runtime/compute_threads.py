"""How many threads compute a forward: the kernels' own, and torch's where they have work."""

import os
from dataclasses import dataclass

import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.experts.linear import FEW_TOKENS
from moe_tool.native.kernels import is_native, set_threads
from moe_tool.native.lookup_choice import choose_lookup


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeThreads:
    """A session's threads. Setting them changes the whole process."""

    n_threads: int
    kernels_decode: bool
    """Whether the kernels compute every matrix that a few tokens meet"""

    def begin(self) -> None:
        """Give all threads to the kernels and to torch; the first time, find out which kernels."""
        set_threads(self.n_threads)
        choose_lookup()
        torch.set_num_threads(self.n_threads)

    def before_forward(self, n_tokens: int) -> None:
        """Leave torch one thread where the kernels do the work.

        Torch's threads go on spinning when their part of an operation is done, on the cores that
        the kernels' threads need next: two of each on two cores took twice as long as the kernels'
        two beside one.

        Args:
            n_tokens: of the coming forward, all sequences together.
        """
        wanted = 1 if self.kernels_decode and n_tokens <= FEW_TOKENS else self.n_threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


def choose_threads(asked: int | None, manifest: BundleManifest) -> ComputeThreads:
    """Return the threads of a session; the memory budget has no say, so that it cannot change a
    result through them.

    Args:
        asked: `--threads`. None: one for each core. Where torch computes the experts, whose threads
            spin while they wait, one less: it is left to the readers.
        manifest: of the bundle.
    """
    n_cores = len(os.sched_getaffinity(0))
    # Matrices of float32 are torch's at any number of tokens.
    kernels_decode = is_native() and manifest.shape.dtype != "float32"
    n_default = n_cores if kernels_decode else max(1, n_cores - 1)
    return ComputeThreads(n_threads=asked or n_default, kernels_decode=kernels_decode)
