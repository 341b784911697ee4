"""Decode attention, a few queries against a long cache: contract in `api.py`."""
