"""Quantization of matrices to integer codes with scales, and back."""
