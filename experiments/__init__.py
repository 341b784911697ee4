"""Entry points: each module is one absl program, run as `python -m experiments.<name>`."""
