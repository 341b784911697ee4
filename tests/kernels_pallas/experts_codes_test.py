"""Every code of a stored matrix stands for its number, bit for bit, in every backend's product."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import kernels_pallas
from kernels_pallas import backend
from kernels_pallas.experts import gpu_quantized, quantize, reference, tpu_rows
from kernels_pallas.experts.dispatch import arrange, list_blocks
from kernels_pallas.experts.gpu_product import ProductPlan
from kernels_pallas.experts.gpu_rows import PlacedRows
from kernels_pallas.experts.gpu_work import staging, write
from kernels_pallas.experts.inputs import INT4_GROUP
from kernels_pallas.experts.tpu_blocks import Table
from kernels_pallas.gpu_primitives import ROWS
from kernels_pallas.tpu_primitives import tile_rows

COLUMNS = 128
# Of a row of float8s the largest becomes 448, and its scale is then 1.
ONE = {"int8": 1, "int4": 1, "fp8": quantize.FP8_MAX}


def stored(kind):
    """A matrix [1, K, columns] with every byte in each column, its scales, and what it is.

    Scales are powers of two: the products are exact. NaN stands in the second half of columns.
    """
    codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], COLUMNS, axis=1)
    half = COLUMNS // 2
    if kind == "fp8":
        codes[[0x7F, 0xFF], :half] = 0
        w = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e4m3fn)[None]
        return w, jnp.full((1, COLUMNS), 2.0), 2 * w.astype(jnp.float32)
    w = jnp.asarray(codes.view(np.int8))[None]
    if kind == "int8":
        return w, jnp.full((1, COLUMNS), 0.5), w.astype(jnp.float32) / 2
    groups = 2 * 256 // INT4_GROUP
    scale = jnp.broadcast_to(2.0 ** jnp.arange(-2, groups - 2)[:, None], (1, groups, COLUMNS))
    return w, scale, quantize.unpack_int4(w, scale)


def on_tpu(x_RK, w, scale, kind):
    places = arrange(jnp.zeros(len(x_RK), jnp.int32), 1, tile_rows(x_RK.dtype))
    rows = tpu_rows.RowOperands([x_RK[places.source_P]])
    by = tpu_rows.Matrices([w], [scale], False, kind, jnp.int32(0))
    sizes = tpu_rows.row_sizes("forward", rows, by, [jnp.float32], len(x_RK), 1)
    table = Table.of(list_blocks(places, sizes.block, unit=sizes.unit))
    cost = tpu_rows.row_cost(rows, by, [jnp.float32], len(x_RK), 1, sizes.cores)
    plain = lambda products, *_: products  # noqa: E731
    outs = [jnp.float32]
    (y_PF,) = tpu_rows.grouped_rows(rows, by, table, sizes, plain, outs, name="codes", cost=cost)
    return places.back(y_PF)


def on_gpu(x_RK, w, scale, kind):
    plan = ProductPlan(1, ROWS, COLUMNS, 2, 1)
    rows = PlacedRows.of(jnp.zeros(len(x_RK), jnp.int32), 1, jnp.int32(0), size=ROWS, granule=ROWS)
    x_PK, scale_P = rows.spread(x_RK, 1), None
    if kind == "int4":
        x_PK = gpu_quantized.halved(x_PK)
    if kind == "fp8":
        rounded_PK, scale_P1 = quantize.fp8_rows(x_PK)
        x_PK, scale_P = rounded_PK.astype(jnp.bfloat16), scale_P1[:, 0]
    cost = pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0)
    (y_PF,) = gpu_quantized.product(
        gpu_quantized.Stored(x_PK, scale_P, (w,), (scale,)),
        rows.blocks_BF,
        plan,
        functools.partial(write, plan=plan),
        extras=[],
        out_type=(jax.ShapeDtypeStruct((x_PK.shape[0], COLUMNS), jnp.float32),),
        scratch=[staging(1, jnp.float32, line=64)],
        name="codes",
        cost=cost,
    )
    return rows.gather(y_PF[None], 1)


def on_reference(x_RK, w, scale, kind):
    sizes_E = jnp.int32([len(x_RK)])
    how = {"scale_NF": scale, "stored": kind, "dtype": jnp.float32}
    return reference.grouped_matmul(x_RK, w, sizes_E, jnp.int32(0), **how)


ON = {"reference": on_reference, "tpu": on_tpu, "gpu": on_gpu}


@pytest.mark.parametrize(
    ("kind", "name", "device"),
    [
        *((kind, "reference", "cpu") for kind in ONE),
        *((kind, "tpu", "TPU7x") for kind in ONE),
        ("fp8", "tpu", "TPU v5 lite"),  # whose multiplier takes another float8
        *((kind, "gpu", "NVIDIA H100 80GB HBM3") for kind in ONE),
    ],
)
def test_a_row_that_is_one_input_channel_gives_its_line_of_the_matrix(
    kind, name, device, monkeypatch
):
    monkeypatch.setattr(backend, "device_kind", lambda: device)
    w, scale, numbers = stored(kind)
    K = numbers.shape[1]
    x_RK = jnp.eye(K, dtype=jnp.bfloat16) * ONE[kind]
    simulated = contextlib.nullcontext if name == "reference" else kernels_pallas.interpreted
    with simulated():
        products = jax.jit(functools.partial(ON[name], kind=kind))(x_RK, w, scale)
    want = np.array(numbers[0] * ONE[kind])
    want[:, np.isnan(want).any(0)] = np.nan  # NaN times zero, too
    assert np.isnan(want).any() == (kind == "fp8")
    np.testing.assert_array_equal(products, want)
