"""Time the kernels where they run, compile them and the model where they do not."""
