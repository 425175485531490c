"""How fast a bundle runs: prompt and decode, at depths, budgets and policies."""
