"""The bundles of tiny models that a run's tests have."""

from tests.runtime.conftest import tiny_bundle

__all__ = ["tiny_bundle"]
