"""Quantizers of an expert's matrices: one file for each name of `--quantizer`."""
