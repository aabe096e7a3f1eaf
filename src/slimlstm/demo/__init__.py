"""The embedded language model, and a tour that compresses it by every method."""
