"""How an expert's matrices become integer codes: one file for each name of `--quantizer`."""
