"""The pieces of a mixture of experts, for experts that compute something else than `expert_mlp`.

`dispatch` sorts routed rows by expert, `grouped_matmul` multiplies each expert's rows by its
matrix, `combine` brings rows back to their tokens; what happens between products is the caller's.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.backend import Backend, choose, vary_alike
from kernels_pallas.experts.dispatch import Dispatch, combine_sorted, sort_rows
from kernels_pallas.experts.inputs import Inputs, among_layers

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


def dispatch(expert_TX: jax.Array, num_experts: int) -> Dispatch:
    """Sort routed rows by expert, in token order inside one.

    Args:
        expert_TX: whole numbers, the expert of each choice; ids outside 0..E-1 are no expert.
        num_experts: E.

    Returns:
        order_R, the routed row (token * X + choice) of each sorted row, and group_sizes_E, the rows
        of each expert. Rows of no expert are sorted last and not counted.

    Raises:
        ValueError: an argument is not of this kind.
    """
    expert_TX = jnp.asarray(expert_TX)
    _check_dimensions("expert_TX", expert_TX, 2)
    _check_whole("expert_TX", expert_TX)
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; give one expert at least")
    return sort_rows(expert_TX, num_experts)


def combine(y_RD: jax.Array, to: Dispatch, experts_per_token: int) -> jax.Array:
    """Bring sorted rows back to their tokens and add a token's choices up.

    Args:
        y_RD: rows in the order of `dispatch`; those of no expert count as zero, whatever they hold.
        to: from `dispatch`.
        experts_per_token: X.

    Returns:
        y_TD in the dtype of the rows; zero for tokens of no expert.

    Raises:
        ValueError: the number of rows is not that of `dispatch`, or not a multiple of X.
    """
    y_RD, to = jnp.asarray(y_RD), Dispatch(*map(jnp.asarray, to))
    _check_dimensions("y_RD", y_RD, 2)
    (R, _), rows, X = y_RD.shape, to.order_R.shape[0], experts_per_token
    if rows != R:
        raise ValueError(f"y_RD has {R} rows and dispatch sorted {rows}; bring all of them back")
    if X < 1 or R % X:
        raise ValueError(f"experts_per_token is {X}, which does not divide {R} rows; give X")
    return combine_sorted(y_RD, to, X)


def grouped_matmul(
    x_RD: jax.Array,
    w_NDF: jax.Array,
    group_sizes_E: jax.Array,
    first: jax.Array | int = 0,
    *,
    backend: Backend | None = None,
) -> jax.Array:
    """Multiply each run of sorted rows by its expert's matrix.

    Reverse-mode differentiable in rows and matrices. Rows of no expert may hold anything, NaN
    included, and so may their gradients: they reach no result and no gradient.

    Args:
        x_RD: rows sorted by expert.
        w_NDF: float matrices in the dtype of x, of these experts and perhaps of others, such as
            those of all layers; only those of experts with rows are read.
        group_sizes_E: whole numbers, the rows of each expert, R together at most; rows beyond their
            sum are no expert's.
        first: number of expert 0's matrix in w_NDF; the others follow it.
        backend: "tpu", "gpu" or "reference"; None is the best that takes these shapes here. A
            kernel takes what it takes in `expert_mlp`.

    Returns:
        y_RF in the dtype of x, summed in float32; zero for rows of no expert.

    Raises:
        ValueError: shapes or dtypes disagree.
        NotImplementedError: the named backend cannot compute this here.
    """
    if isinstance(first, int | np.integer):
        most = max(len(w_NDF) - len(group_sizes_E), 0)
        if not 0 <= first <= most:
            raise ValueError(f"first is {first}; take one of 0..{most}, so that E matrices follow")
    x_RD, w_NDF, sizes_E, first = map(jnp.asarray, (x_RD, w_NDF, group_sizes_E, first))
    _check(x_RD, w_NDF, sizes_E, first)
    (R, D), F, (E,) = x_RD.shape, w_NDF.shape[2], sizes_E.shape
    if not R:
        return jnp.zeros((0, F), x_RD.dtype)
    arguments = _Arguments(x_RD, w_NDF, sizes_E.astype(jnp.int32), first.astype(jnp.int32))

    def shaped(*shape: int, dtype: Any = x_RD.dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    expert_TX, down = shaped(R, 1, dtype=jnp.int32), shaped(len(w_NDF), F, D)
    like_mlp = Inputs(x_RD, w_NDF, w_NDF, down, expert_TX, shaped(R, 1), first, None, None)
    return _apply(choose(backend, "experts", like_mlp, E), vary_alike(arguments))


class _Arguments(NamedTuple):
    """The arrays of a product."""

    x_RD: jax.Array
    w_NDF: jax.Array
    sizes_E: jax.Array
    first: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(backend: ModuleType, x: _Arguments) -> jax.Array:
    return backend.grouped_matmul(*x)


def _apply_fwd(backend: ModuleType, x: _Arguments) -> tuple[jax.Array, _Arguments]:
    return backend.grouped_matmul(*x), x


def _apply_bwd(backend: ModuleType, x: _Arguments, dy_RF: jax.Array) -> tuple[_Arguments]:
    dy_RF = jnp.asarray(dy_RF)
    dx_RD = backend.grouped_matmul(dy_RF, x.w_NDF, x.sizes_E, x.first, is_transposed=True)
    dw_EDF = backend.grouped_outer(x.x_RD, dy_RF, x.sizes_E, x.w_NDF.dtype)
    dw_NDF = among_layers(dw_EDF, x.first, x.w_NDF)
    return (_Arguments(dx_RD, dw_NDF, None, None),)  # type: ignore[arg-type]


_apply.defvjp(_apply_fwd, _apply_bwd)


def _check_dimensions(name: str, array: jax.Array, ndim: int) -> None:
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; reshape it to {ndim} dimensions")


def _check_whole(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} is {array.dtype}; cast it to int32")


def _check(x_RD: jax.Array, w_NDF: jax.Array, sizes_E: jax.Array, first: jax.Array) -> None:
    names = ("x_RD", "w_NDF", "group_sizes_E", "first")
    for name, array, ndim in zip(names, (x_RD, w_NDF, sizes_E, first), (2, 3, 1, 0), strict=True):
        _check_dimensions(name, array, ndim)
    _check_whole("group_sizes_E", sizes_E)
    _check_whole("first", first)
    if w_NDF.shape[1] != x_RD.shape[1]:
        raise ValueError(
            f"w_NDF has shape {w_NDF.shape}; x_RD {x_RD.shape} asks for D of {x_RD.shape[1]}: "
            "transpose the matrices or give others"
        )
    if x_RD.dtype not in _DTYPES:
        raise ValueError(
            f"x_RD is {x_RD.dtype}; give one of {', '.join(jnp.dtype(d).name for d in _DTYPES)}"
        )
    if w_NDF.dtype != x_RD.dtype:
        raise ValueError(f"x_RD is {x_RD.dtype} and w_NDF {w_NDF.dtype}; cast one of them")
    (E,), N = sizes_E.shape, w_NDF.shape[0]
    if not 1 <= E <= N:
        raise ValueError(
            f"group_sizes_E is of {E} experts and w_NDF of {N} matrices; give 1 to {N} sizes"
        )
