"""Serving: generate text and score it with a loaded checkpoint."""
