"""What is trained: weights that stay codes."""
