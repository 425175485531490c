"""Speeds of this machine, measured once."""
