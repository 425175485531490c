"""Artifacts described: one describer for each kind, from file to facts."""
