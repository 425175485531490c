"""A checkpoint, a profile and a buddy map become one verified bundle."""
