"""Chunked attention with temperature: contract in `api.py`, plain XLA in `reference.py`."""
