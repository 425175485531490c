"""Decisions over ids, counts and gate weights; no file here moves data or reads a clock."""
