"""Quantized checkpoints presented as the float tensors that they stand for, one file a format."""
