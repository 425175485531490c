"""Text by domain, packed into token sequences that depend on seed and sources alone."""

TEXT_FIELDS = ("text", "content")
"""Fields or columns of a row that may hold its text, the first one found."""
