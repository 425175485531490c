"""Benchmarks of one machine: disk, memory, experts, decoder layers, GPU."""
