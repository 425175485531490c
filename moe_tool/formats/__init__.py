"""Artifacts become files and back; every reader treats its file as hostile."""
