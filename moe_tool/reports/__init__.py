"""Artifacts as people read them."""
