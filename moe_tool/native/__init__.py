"""Compiled products of tokens with weights as they lie in a record, and their description."""
