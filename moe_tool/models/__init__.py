"""Hugging Face checkpoints and architectures: the only room that knows transformers' internals."""
