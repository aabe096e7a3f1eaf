"""Measured parts of README.md and of pages in docs: tables, and sentences with numbers."""
