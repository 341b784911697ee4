"""Pallas kernels, one folder per operation; this package knows jax only, never llama4_jax."""
