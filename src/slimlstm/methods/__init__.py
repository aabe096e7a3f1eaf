"""Compress one matrix: methods, storages, and the cost of a rank."""
