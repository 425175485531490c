"""Tokens to tokens: a bundle and a memory budget become a model that is ready to generate."""
