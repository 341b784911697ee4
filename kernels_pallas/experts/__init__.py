"""Mixture-of-experts arithmetic: contract in `api.py`, plain XLA in `reference.py`."""
