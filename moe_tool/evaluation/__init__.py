"""How far a bundle under a policy is from the exact model, measured on text."""
