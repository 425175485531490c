"""Forward pass of routed experts over weights in their stored form."""
