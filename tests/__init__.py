"""Tests; the folders mirror the tree, and `house/` checks the tree itself."""
