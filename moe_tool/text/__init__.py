"""Text by domain, read from many places and packed into token sequences that depend on seed and sources alone."""
