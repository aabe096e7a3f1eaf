"""Collect moments from batches, and fit factors again to the compressed model's inputs."""
