"""Trained models to try the library on: plain PyTorch that knows nothing of compression."""
