"""Training of a bundle's codes and routers."""
