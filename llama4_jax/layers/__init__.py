"""Layers of the decoder, as modules with parameters and functions without."""
