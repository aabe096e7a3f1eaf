"""Time layers and models against other engines."""
