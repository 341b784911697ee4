"""Prefill attention on GPUs: no kernel yet, so that the reference serves them."""

from kernels_pallas.attention.visibility import Settings
from kernels_pallas.decode.inputs import Inputs


def refusal(x: Inputs, how: Settings) -> str:
    """Return why these arrays cannot be taken."""
    del x, how
    return "it has no kernel for GPUs yet"


def forward(x: Inputs, how: Settings, *, out_dtype: object):
    """Never called: everything is refused."""
    raise NotImplementedError("there is no kernel yet")
