"""One pass over a model, recording what its routers choose and what its experts output."""
