"""A weight in use: plain, stored in fewer bits, or with a low-rank adapter; one product for all.

    y_BTNH = project("BTD,DNH->BTNH", x_BTD, self.w_q_DNH, out=axes)

A layer declares plain parameters; `quantize` and `add_adapter` make others to put in their places,
and the layer's code stays as it is. With a plain parameter `project` is `jnp.einsum`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.experts import quantize as quantizers
from kernels_pallas.experts.inputs import INT4_GROUP, WeightScales
from llama4_jax.layers.param import Buffer, in_use, is_parameter, is_ready, leaf_name, weight
from llama4_jax.parallel.axes import Axes
from llama4_jax.parallel.shard import einsum, look_up, shard

Storage = Literal["int8", "int4", "fp8"]


class _Dims(NamedTuple):
    """Dimensions of a matrix by what a product does with them: those of experts, sums, outputs."""

    experts: tuple[int, ...]
    contracted: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, axes: Axes, contracted: tuple[int, ...]) -> "_Dims":
        summed = tuple(sorted(d % len(axes) for d in contracted))
        experts = tuple(d for d, name in enumerate(axes) if name == "experts")
        rest = tuple(d for d in range(len(axes)) if d not in summed + experts)
        return cls(experts, summed, rest)

    @property
    def order(self) -> tuple[int, ...]:
        return self.experts + self.contracted + self.outputs


class Quantized(nnx.Module):
    """A matrix stored in fewer bits, and the scales that its values are multiplied by.

    Attributes:
        values: int8 or float8_e4m3fn of the matrix's shape; of int4 two input channels share an
            int8 along the last contracted dimension, as `kernels_pallas.WeightScales` describes.
        scales: float32, one for each output channel: the matrix's shape without its contracted
            dimensions; of int4 with the last of them divided by 128.
        storage: how values are stored.
        contracted: dimensions over which a product sums, counted from the last.
    """

    def __init__(
        self, values: Buffer, scales: Buffer, *, storage: Storage, contracted: tuple[int, ...]
    ):
        self.values = values
        self.scales = scales
        self.storage = storage
        self.contracted = contracted

    @property
    def axes(self) -> Axes:
        """Return the logical axes of the matrix."""
        return self.values.get_metadata("axes")


class LowRank(nnx.Module):
    """A matrix W plus scale * A B, where A [inputs, rank] and B [rank, outputs] are trained.

    Attributes:
        base: W, plain or quantised.
        a, b: the factors; of experts, with a leading dimension of experts.
        scale: usually alpha / rank.

    Source: arXiv 2106.09685.
    """

    def __init__(self, base: "nnx.Param | Quantized", a: nnx.Param, b: nnx.Param, *, scale: float):
        self.base = base
        self.a = a
        self.b = b
        self.scale = scale


Weight = nnx.Param | Quantized | LowRank


def _described(w: nnx.Param | Quantized) -> tuple[Axes, _Dims]:
    """Return the logical axes of a matrix, and what a product does with its dimensions.

    Raises:
        ValueError: no product takes this parameter.
    """
    if isinstance(w, Quantized):
        return w.axes, _Dims.of(w.axes, w.contracted)
    contracted = w.get_metadata("contracted", None)
    if contracted is None:
        raise ValueError(f"a parameter of role {w.get_metadata('role')!r} is no matrix")
    axes = w.get_metadata("axes")
    return axes, _Dims.of(axes, contracted)


# ------------------------------------------------------------------------------- products


def project(equation: str, x: jax.Array, w: Weight, *, out: Axes) -> jax.Array:
    """Multiply activations by a weight; the result is in the dtype of the activations.

    Args:
        equation: as `jnp.einsum` reads it, activations before the weight, in capital letters.
        x: activations.
        w: the weight. Its int8 or float8 values are multiplied as they are stored, and the sums
            by their scales, in float32.
        out: logical axes of the result.
    """
    if isinstance(w, LowRank):
        return project(equation, x, w.base, out=out) + _low_rank(equation, x, w, out)
    if not isinstance(w, Quantized) or w.storage == "int4":
        return einsum(equation, x, dense(w, x.dtype), out=out)
    values = weight(w.values, x.dtype)  # every int8 and every float8 is a bfloat16 too
    sums = einsum(equation, x, values, out=out, preferred_element_type=jnp.float32)
    of_w, result = equation.partition(",")[2].split("->")
    kept = [letter for letter in of_w if letter in result]
    sizes = dict(zip(kept, w.scales.shape, strict=True))
    scales = weight(w.scales, sums.dtype).reshape([sizes.get(letter, 1) for letter in result])
    axes = tuple(a if letter in kept else None for a, letter in zip(out, result, strict=True))
    return (sums * shard(scales, axes)).astype(x.dtype)


def _low_rank(equation: str, x: jax.Array, w: LowRank, out: Axes) -> jax.Array:
    """Compute scale * (x A) B, which is narrow in between."""
    of_x, of_w, result = equation.replace("->", ",").split(",")
    summed = "".join(letter for letter in of_w if letter not in result)
    kept = "".join(letter for letter in of_w if letter in result)
    narrow = "".join(letter for letter in of_x if letter not in summed) + "r"
    axes = dict(zip(result, out, strict=True))
    a, b = weight(w.a, x.dtype), weight(w.b, x.dtype)
    x_r = einsum(
        f"{of_x},{summed}r->{narrow}", x, a, out=tuple(axes.get(letter) for letter in narrow)
    )
    return w.scale * einsum(f"{narrow},r{kept}->{result}", x_r, b, out=out)


def look_up_rows(table: nnx.Param | Quantized, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Take rows of an embedding table [V, D]. Returns x_BTD in `dtype`."""
    if not isinstance(table, Quantized):
        return look_up(weight(table, dtype), tokens_BT)
    values = look_up(weight(table.values, jnp.dtype(jnp.float32)), tokens_BT)
    scales = look_up(weight(table.scales, values.dtype)[:, None], tokens_BT)
    return (values * scales).astype(dtype)


def dense(w: Weight, dtype: jnp.dtype) -> jax.Array:
    """Return the matrix that a weight stands for, whole along its embed dimension."""
    if isinstance(w, nnx.Variable):
        return weight(w, dtype)
    if isinstance(w, LowRank):
        return dense(w.base, dtype) + w.scale * _outer(w, dtype)
    values, scales = (weight(part, part[...].dtype) for part in (w.values, w.scales))
    _, dims = _described(w)
    if w.storage != "int4":
        matrix = values.astype(jnp.float32) * jnp.expand_dims(scales, dims.contracted)
        return matrix.astype(dtype)
    packed, grouped = _to_matrices(values, dims), _to_matrices(scales, dims)
    matrix = quantizers.unpack_int4(packed, grouped).astype(dtype)
    return _from_matrices(matrix, dims, _scaled(values.shape, dims, times=2))


def _outer(w: LowRank, dtype: jnp.dtype) -> jax.Array:
    """Return A B."""
    axes, dims = _described(w.base)
    letters = [chr(ord("A") + d) for d in range(len(axes))]
    experts, ins, outs = ("".join(letters[d] for d in group) for group in dims)
    equation = f"{experts}{ins}r,{experts}r{outs}->{''.join(letters)}"
    return einsum(equation, weight(w.a, dtype), weight(w.b, dtype), out=in_use(axes))


class ExpertMatrices(NamedTuple):
    """Gate, up and down as `expert_mlp` takes them, with scales if they are quantised."""

    matrices: tuple[jax.Array, ...]
    scales: WeightScales | None


ExpertWeights = tuple[Weight, Weight, Weight]


def expert_matrices(
    weights: ExpertWeights, dtype: jnp.dtype, *, is_stacked: bool = False
) -> ExpertMatrices:
    """Return the matrices of a mixture of experts.

    Args:
        weights: gate, up and down.
        dtype: of the activations that they meet.
        is_stacked: whether they are those of all groups of layers, read in place, as in decoding
            (`can_be_stacked`). Quantised ones are then multiplied as they are stored. Of one layer
            they are made dense, because a gradient may pass through them.
    """
    if not is_stacked:
        return ExpertMatrices(tuple(dense(w, dtype) for w in weights), None)
    stored = _quantized(weights)
    if not stored:
        plain = (w for w in weights if isinstance(w, nnx.Variable))
        return ExpertMatrices(tuple(weight(w, dtype, is_stacked=True) for w in plain), None)

    def at_rest(part: Buffer) -> jax.Array:
        return weight(part, part[...].dtype, is_stacked=True)

    gate, up, down = (at_rest(w.scales) for w in stored)
    return ExpertMatrices(tuple(at_rest(w.values) for w in stored), WeightScales(gate, up, down))


def can_be_stacked(weights: ExpertWeights, dtype: jnp.dtype) -> bool:
    """Can stacked matrices of experts be read where they lie, neither cast nor gathered?"""
    if stored := _quantized(weights):
        return all(is_ready(w.values, w.values[...].dtype) for w in stored)
    return all(isinstance(w, nnx.Variable) and is_ready(w, dtype) for w in weights)


def _quantized(weights: ExpertWeights) -> list[Quantized]:
    """Return the weights if all are quantised, in one way; else nothing."""
    found = [w for w in weights if isinstance(w, Quantized)]
    alike = len(found) == len(weights) and len({w.storage for w in found}) == 1
    return found if alike else []


# ------------------------------------------------------------------------ other kinds of weight


def quantize(w: nnx.Param, storage: Storage) -> Quantized:
    """Round a matrix to fewer bits, one scale for each output channel or 128 input channels.

    Args:
        w: a matrix, of one layer or of a stack of layers.
        storage: "int8", "fp8", or "int4".

    Raises:
        ValueError: it is no matrix, or int4 does not find its groups of 128 input channels.
    """
    axes, dims = _described(w)
    array, last = w[...], dims.contracted[-1]
    sizes = array.shape[array.ndim - len(axes) :]
    if storage == "int4" and sizes[last] % INT4_GROUP:
        raise ValueError(
            f"int4 takes groups of {INT4_GROUP} input channels, and this matrix has "
            f"{sizes[last]} along {axes[last]!r}; store it as int8"
        )
    run = {"int8": quantizers.quantize_int8, "fp8": quantizers.quantize_fp8}
    values, scales = run.get(storage, quantizers.quantize_int4)(_to_matrices(array, dims))
    if storage == "int4":
        values = _from_matrices(values, dims, _scaled(sizes, dims, by=2))
        scales = _from_matrices(scales, dims, _scaled(sizes, dims, by=INT4_GROUP))
        scale_axes = axes
    else:
        values = _from_matrices(values, dims, sizes)
        kept = sorted(dims.experts + dims.outputs)
        scale_axes = tuple(axes[d] for d in kept)
        scales = scales.reshape(*array.shape[: array.ndim - len(axes)], *(sizes[d] for d in kept))
    return Quantized(
        Buffer(values, axes=axes, role="buffer"),
        Buffer(scales, axes=scale_axes, role="buffer"),
        storage=storage,
        contracted=w.get_metadata("contracted"),
    )


def add_adapter(
    w: nnx.Param | Quantized, *, rank: int, alpha: float, key: jax.Array, dtype: str = "float32"
) -> LowRank:
    """Give a matrix a low-rank adapter that changes nothing yet: A is random and B zero.

    Args:
        w: a matrix, of one layer or of a stack of layers.
        rank: of the adapter.
        alpha: the product of the factors counts alpha / rank times.
        key: of A.
        dtype: of A and B.

    Raises:
        ValueError: it is no matrix.
    """
    axes, dims = _described(w)
    array = w.values[...] if isinstance(w, Quantized) else w[...]
    stack = array.ndim - len(axes)
    sizes = list(array.shape[stack:])
    if isinstance(w, Quantized) and w.storage == "int4":
        sizes[dims.contracted[-1]] *= 2
    lead, ins, outs = ([sizes[d] for d in group] for group in dims)
    lead = [*array.shape[:stack], *lead]
    of_lead, of_ins, of_outs = (tuple(axes[d] for d in group) for group in dims)
    a = jax.random.normal(key, (*lead, *ins, rank)) / math.sqrt(math.prod(ins))
    b = jnp.zeros((*lead, rank, *outs), dtype)
    return LowRank(
        w,
        nnx.Param(a.astype(dtype), axes=(*of_lead, *of_ins, None), role="adapter"),
        nnx.Param(b, axes=(*of_lead, None, *of_outs), role="adapter"),
        scale=alpha / rank,
    )


def replace_weights(model: Any, replace: Callable[[str, nnx.Variable], Any]) -> Any:
    """Return a model with other weights in the places of its parameters.

    Args:
        model: any tree of modules.
        replace: (name, parameter) -> what stands in its place, such as itself.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, node: replace(leaf_name(path), node) if is_parameter(node) else node,
        model,
        is_leaf=is_parameter,
    )


def _scaled(sizes: tuple[int, ...], dims: _Dims, *, times: int = 1, by: int = 1) -> list[int]:
    """Return the sizes with the last contracted dimension multiplied and divided."""
    changed = list(sizes[len(sizes) - len(dims.order) :])
    changed[dims.contracted[-1]] = changed[dims.contracted[-1]] * times // by
    return changed


def _to_matrices(x: jax.Array, dims: _Dims) -> jax.Array:
    """Lay a weight out as [stack of layers ..., experts ..., inputs, outputs]."""
    stack = x.ndim - len(dims.order)
    moved = x.transpose(*range(stack), *(stack + d for d in dims.order))
    lead, ins = stack + len(dims.experts), len(dims.contracted)
    return moved.reshape(*moved.shape[:lead], math.prod(moved.shape[lead : lead + ins]), -1)


def _from_matrices(x: jax.Array, dims: _Dims, sizes: Sequence[int]) -> jax.Array:
    """Undo `_to_matrices` for a weight of these sizes."""
    stack = x.ndim - 2 - len(dims.experts)
    moved = x.reshape(*x.shape[:stack], *(sizes[d] for d in dims.order))
    back = sorted(range(len(dims.order)), key=dims.order.__getitem__)
    return moved.transpose(*range(stack), *(stack + d for d in back))
