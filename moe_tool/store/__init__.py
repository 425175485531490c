"""Where expert weights are, with the way they travel."""
