"""Hugging Face checkpoints and architectures: the only room that uses transformers' internals."""
