"""Divergence of a bundle under a policy from the exact model, measured on text."""
