"""The names that flags of these commands offer; help needs these and not jax."""

SUITES = ("kernels", "compile", "nano")
CHIPS = ("v5e", "v5p", "v6e", "tpu7x", "h100", "h200")
KERNEL_CHIPS = ("v5e", "v5p", "v6e", "tpu7x", "h100")
"""Kernels are compiled for these unless --target says otherwise."""
PROGRAM_CHIPS = ("v5p", "h100")
"""The sizes of the serving and training programs are chosen for these."""
