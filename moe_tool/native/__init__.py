"""Compiled kernels: products of tokens with weights as they lie in a record."""
