"""What is trained of a bundle."""
