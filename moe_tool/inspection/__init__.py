"""Descriptions of artifacts: one function per kind, from file to facts."""
