"""Tensors become integer codes with scales, and back."""
