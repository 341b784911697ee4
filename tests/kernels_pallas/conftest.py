"""Halve the time of the simulators: they ask Python about each access of a kernel to memory.

Of the dozen numbers and arrays of each question jax makes arrays on a device, which is most of the
work, and the simulators make numbers and NumPy arrays of them again. Here they get NumPy's as they
come. The simulators copy what they keep, and what they find out, races included, stays theirs.
Names that a version of jax does not have are left alone, and its simulators as slow as they are.
"""

import types

import jax
import pytest
from jax._src import api, callback
from jax._src.pallas.mosaic_gpu.interpret import shared_memory


@pytest.fixture(autouse=True, scope="package")
def arrays_as_they_come():
    """Call the simulators with NumPy arrays."""

    def device_put(arrays, device):
        return arrays

    def to_int(x):  # jax's own knows only arrays of jax
        return x if isinstance(x, int | jax.core.Tracer) else int(x)

    with pytest.MonkeyPatch.context() as patch:
        its_api = types.SimpleNamespace(**vars(api) | {"device_put": device_put})
        patch.setattr(callback, "api", its_api, raising=False)
        patch.setattr(shared_memory, "_to_int", to_int, raising=False)
        yield
