"""Commands: each parses arguments, makes one call and shows the result."""
