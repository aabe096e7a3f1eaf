"""The embedded language model and the tour of it."""
