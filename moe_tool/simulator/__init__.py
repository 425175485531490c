"""Costs of memory budgets and eviction policies, from a recorded trace."""
