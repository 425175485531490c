"""Planning: the best plan for a profile, a machine and a memory budget."""
