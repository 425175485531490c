"""From a profile, a machine and a memory budget to the best plan for them."""
