"""Mixtures of lookup experts: a checkpoint to rows on disk, and runs that read a token's row."""
