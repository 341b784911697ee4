"""Prefill attention, a piece of each row against its cache: contract in `api.py`."""
