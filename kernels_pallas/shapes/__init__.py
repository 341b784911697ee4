"""Real shapes of the operations by name: tests, tuning and benchmarks speak of the same ones.

A shape knows how to make its arrays, and the least work and traffic that any implementation needs.
`build` can be traced, so `jax.eval_shape(shape.build, key)` gives the same arrays without numbers.
"""

from collections.abc import Mapping

from kernels_pallas.shapes.attention import Attention, Decode
from kernels_pallas.shapes.experts import Experts

Shape = Attention | Decode | Experts

_SCOUT = {"N": 40, "K": 8, "H": 128}  # Maverick's are the same
_NANO = {"N": 4, "K": 2, "H": 32}
_TEMPERATURE = (8192, 0.1)

ATTENTION = (
    Attention(name="scout_chunk_32k", B=1, T=32768, chunk_size=8192, **_SCOUT),
    Attention(name="scout_chunk_8k", B=1, T=8192, chunk_size=8192, **_SCOUT),
    Attention(name="scout_nope_32k", B=1, T=32768, temperature=_TEMPERATURE, **_SCOUT),
    Attention(
        name="packed_8k", B=1, T=8192, chunk_size=8192, segments=(3000, 1700, 2492, 1000), **_SCOUT
    ),
    Attention(name="vision", B=4, T=577, N=16, K=16, H=88, is_causal=False),  # an image in 4 tiles
    Attention(name="nano_chunk", B=8, T=256, chunk_size=64, **_NANO),
    Attention(name="nano_nope", B=8, T=256, temperature=(512, 0.1), **_NANO),
)

DECODE = (
    Decode(name="scout_decode_8k_b16", B=16, S=8192),
    Decode(name="scout_decode_128k", S=131_072),
    Decode(name="scout_decode_1m", S=1_048_576),
    Decode(name="scout_decode_1m_int8", S=1_048_576, dtype="int8"),
    Decode(name="scout_decode_1m_fp8", S=1_048_576, dtype="float8_e4m3fn"),
    Decode(name="scout_decode_1m_verify", S=1_048_576, T=5),
    Decode(name="scout_decode_1m_paged", S=1_048_576, page_size=256),
    Decode(name="scout_decode_10m", S=10_485_760),
    Decode(name="nano_decode", B=8, S=512, temperature=(512, 0.1), **_NANO),
)

_SCOUT_EXPERTS = {"D": 5120, "F": 8192, "E": 16}
_MAVERICK_EXPERTS = {"D": 5120, "F": 8192, "E": 128}
_NANO_EXPERTS = {"D": 128, "F": 160, "E": 4, "dtype": "float32"}

EXPERTS = (
    Experts(name="scout_experts_8k", T=8192, **_SCOUT_EXPERTS),
    Experts(name="scout_experts_8k_hot", T=8192, routing="hot", **_SCOUT_EXPERTS),
    Experts(name="scout_experts_4k_top2", T=4096, X=2, **_SCOUT_EXPERTS),
    Experts(name="scout_experts_1", T=1, has_gradient=False, **_SCOUT_EXPERTS),
    Experts(name="scout_experts_8", T=8, has_gradient=False, **_SCOUT_EXPERTS),
    Experts(name="scout_experts_64", T=64, has_gradient=False, **_SCOUT_EXPERTS),
    *(
        Experts(name=f"scout_experts_{name}_{stored}", T=T, stored=stored, **_SCOUT_EXPERTS)
        for stored in ("int8", "int4", "fp8")
        for name, T in (("8k", 8192), ("64", 64))
    ),
    Experts(name="scout_experts_1_int4", T=1, stored="int4", **_SCOUT_EXPERTS),
    Experts(name="maverick_experts_8k", T=8192, **_MAVERICK_EXPERTS),
    Experts(name="maverick_experts_1", T=1, has_gradient=False, **_MAVERICK_EXPERTS),
    Experts(name="maverick_experts_64", T=64, has_gradient=False, **_MAVERICK_EXPERTS),
    Experts(name="nano_experts_2k", T=2048, **_NANO_EXPERTS),
    Experts(name="nano_experts_1", T=1, **_NANO_EXPERTS),
)

# Shapes of no model, in which everything that may differ does: small enough for any device.
ODD = (
    Attention(
        name="odd_88", B=2, T=577, N=6, K=3, H=88, chunk_size=200, padding=31, return_lse=True
    ),
    Attention(
        name="odd_packed", B=1, T=700, N=8, K=2, H=64, chunk_size=256, segments=(300, 9, 350),
        padding=41, temperature=(64, 0.1), return_lse=True,
    ),
    Attention(name="odd_256", B=1, T=333, N=4, K=4, H=256, return_lse=True),
    Attention(name="odd_1", B=1, T=1, N=4, K=1, H=128, has_gradient=False),
    Attention(name="odd_128", B=1, T=128, N=2, K=2, H=64),
    Attention(name="odd_2048", B=1, T=2048, N=2, K=1, H=128),
    Attention(name="odd_blind", B=1, T=512, N=2, K=1, H=128, padding=300),  # rows that see nothing
    Decode(
        name="odd_decode", B=3, S=1000, T=3, N=6, K=2, H=64, lengths=(1000, 515, 3),
        chunk_size=256, temperature=(64, 0.1), return_lse=True,
    ),
    Decode(name="odd_decode_1", S=72, N=2, K=1, H=64),
    Decode(name="odd_decode_32", B=2, S=512, N=10, K=2, lengths=(301, 33), page_size=32),
    Decode(
        name="odd_decode_fp8", B=2, S=1024, T=8, N=10, K=2, dtype="float8_e4m3fn",
        lengths=(700, 33), page_size=128, return_lse=True,
    ),
    Decode(
        name="odd_decode_int8", B=2, S=1024, T=2, N=10, K=2, dtype="int8",
        lengths=(1024, 200), page_size=128, return_lse=True,
    ),
    Experts(
        name="odd_experts", T=333, X=2, D=256, F=384, E=6, padding=31, has_shared=True,
    ),
    Experts(name="odd_experts_1", T=1, D=256, F=384, E=6, has_shared=True),
    Experts(name="odd_experts_hot", T=700, D=256, F=384, E=4, routing="hot", padding=3),
    Experts(name="odd_experts_empty", T=129, D=384, F=256, E=16, routing="every_other"),
    Experts(name="odd_experts_nobody", T=20, D=256, F=256, E=4, padding=20),
    Experts(name="odd_experts_f32", T=77, X=2, D=256, F=384, E=6, padding=5, dtype="float32"),
    *(
        Experts(
            name=f"odd_experts_{stored}", T=45, X=2, D=256, F=384, E=6, padding=5,
            has_shared=True, stored=stored,
        )
        for stored in ("int8", "int4", "fp8")
    ),
)  # fmt: skip

SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in (*ATTENTION, *DECODE, *EXPERTS, *ODD)}
