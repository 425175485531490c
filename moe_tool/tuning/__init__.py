"""Training of a bundle: codes of experts, and mask routers."""
