"""Buddy maps: ranked substitutes for every expert, from a profile."""
