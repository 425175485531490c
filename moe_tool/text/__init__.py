"""Text by domain, packed into token sequences that depend on seed and sources alone."""
