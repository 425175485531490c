"""Mixture of Lookup Experts: configuration, model, rows of its experts, and its checkpoints."""
