"""Residency of experts: whether what is in memory changes while a run answers."""

from typing import Literal

Residency = Literal["frozen", "cache"]
