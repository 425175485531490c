"""Experts in memory: slots, eviction, and reads on worker threads."""
