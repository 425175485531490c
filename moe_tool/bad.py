"""A module."""

N = 1
"""Of the layers."""
