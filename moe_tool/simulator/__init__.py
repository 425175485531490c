"""Simulation of memory budgets and eviction policies on a recorded trace."""
