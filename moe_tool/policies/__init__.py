"""Decisions over ids, counts and gate weights; what moves data or reads a clock is elsewhere."""
