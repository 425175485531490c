"""What a memory budget and an eviction policy would cost, from a recorded trace."""
