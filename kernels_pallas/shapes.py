"""Real shapes of the operations by name: tests, tuning and benchmarks speak of the same ones.

Each stands with its operation. A shape knows how to make its arrays, and the least work and traffic
that any implementation needs. `build` can be traced, so `jax.eval_shape(shape.build, key)` gives
the same arrays without numbers.
"""

from collections.abc import Mapping

from kernels_pallas.attention import shapes as attention
from kernels_pallas.attention.shapes import Attention
from kernels_pallas.decode import shapes as decode
from kernels_pallas.decode.shapes import Decode
from kernels_pallas.experts import shapes as experts
from kernels_pallas.experts.shapes import Experts
from kernels_pallas.prefill import shapes as prefill
from kernels_pallas.prefill.shapes import Prefill

Shape = Attention | Decode | Prefill | Experts

ATTENTION, DECODE, PREFILL = attention.ATTENTION, decode.DECODE, prefill.PREFILL
EXPERTS = experts.EXPERTS
ODD = (*attention.ODD, *decode.ODD, *prefill.ODD, *experts.ODD)

SHAPES: Mapping[str, Shape] = {
    shape.name: shape for shape in (*ATTENTION, *DECODE, *PREFILL, *EXPERTS, *ODD)
}
"""Every shape by its name."""
