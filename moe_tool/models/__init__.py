"""Hugging Face checkpoints and architectures; the only room that touches transformers' internals."""
