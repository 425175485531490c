"""Text by domain, packed into token sequences that depend on seed and sources alone."""

TEXT_FIELDS = ("text", "content")
"""Fields or columns for a row's text, by descending priority"""
