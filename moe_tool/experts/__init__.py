"""The forward pass of routed experts over weights as they lie in a record."""
