"""Sharding by logical names: constrain an activation, multiply, or run a function on every shard.

Without an active mesh every function here is the plain operation, so model code is written once.
`use_mesh` activates a mesh and the rules that map logical axes to it; both are part of jit's cache
key. Weights must divide evenly (an uneven one is an error that says so); an activation whose
dimension a mesh axis does not divide, like a batch of one, is kept whole along that axis.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.parallel.axes import Axes, check
from llama4_jax.parallel.rules import SINGLE, Rules

_rules = jax.make_user_context(default_value=SINGLE)


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None, rules: Rules = SINGLE) -> Iterator[None]:
    """Activate `mesh` and `rules` for everything traced or run inside; None is one device."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), _rules(rules):
        yield


def has_mesh() -> bool:
    """Is a mesh active?"""
    return not jax.sharding.get_abstract_mesh().empty


def _sizes() -> dict[str, int]:
    return dict(jax.sharding.get_abstract_mesh().shape)


def abstract(build: Callable[..., Any], *args: Any) -> Any:
    """Return the shapes and, under a mesh, the shardings of `build(*args)` without computing it."""
    shapes = jax.eval_shape(build, *args)
    if not has_mesh():
        return shapes
    mesh = jax.sharding.get_mesh()

    def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else P()  # a constant has no layout of its own
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, shapes)


def unsharded_shapes(build: Callable[..., Any], *args: Any) -> Any:
    """Return the shapes of `build(*args)` on one device, whatever mesh is active."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.eval_shape(build, *args)


def mesh_axes(logical: str | None, dim: int | None = None) -> tuple[str, ...]:
    """Return the active mesh axes that divide a logical axis, as many as divide `dim` evenly."""
    sizes = _sizes()
    axes = tuple(a for a in _rules.value.mesh_axes(logical) if sizes.get(a, 1) > 1)
    while dim is not None and axes and dim % math.prod(sizes[a] for a in axes):
        axes = axes[:-1]
    return axes


def _spec(axes: Axes, shape: tuple[int, ...]) -> P:
    check(axes)
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {shape}")
    return P(*(mesh_axes(a, d) or None for a, d in zip(axes, shape, strict=True)))


def shard(x: jax.Array, axes: Axes) -> jax.Array:
    """Lay `x` out by its logical axes; the identity without a mesh."""
    return jax.sharding.reshard(x, _spec(axes, x.shape)) if has_mesh() else x


def shard_weight(x: jax.Array, axes: Axes) -> jax.Array:
    """Lay a weight out by its logical axes.

    Raises:
        ValueError: a dimension is not divisible by its mesh axes.
    """
    if not has_mesh():
        return x
    sizes = _sizes()
    for name, dim in zip(axes, x.shape, strict=True):
        full = mesh_axes(name)
        count = math.prod(sizes[a] for a in full)
        if dim % count:
            divisors = [d for d in range(1, dim + 1) if dim % d == 0]
            raise ValueError(
                f"{name} ({dim}) must be divisible by mesh axes {'*'.join(full)} ({count}); "
                f"choose a size from {divisors[:16]}"
            )
    return shard(x, axes)


def einsum(
    equation: str, *operands: jax.Array, out: Axes, preferred_element_type: Any = None
) -> jax.Array:
    """`jnp.einsum` whose result is laid out by the logical axes `out`.

    Sums over a sharded dimension become an all-reduce or reduce-scatter, as `out` asks.
    """
    how = {"preferred_element_type": preferred_element_type}
    if not has_mesh():
        return jnp.einsum(equation, *operands, **how)
    inputs, result = equation.split("->")
    dims: dict[str, int] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        dims |= zip(letters, operand.shape, strict=True)
    spec = _spec(out, tuple(dims[letter] for letter in result))
    return jnp.einsum(equation, *operands, out_sharding=spec, **how)


def take(table: jax.Array, index: jax.Array, *, out: Axes) -> jax.Array:
    """Gather rows `table[index]`, laid out by the logical axes `out`."""
    if not has_mesh():
        return table[index]
    shape = index.shape + table.shape[1:]
    return table.at[index].get(out_sharding=_spec(out, shape))


def per_shard(
    function: Callable[..., Any],
    *arrays: jax.Array,
    axes: tuple[Axes, ...],
    out: Any,
) -> Any:
    """Run `function` on every shard of `arrays`, each laid out by its entry in `axes`.

    The function's first argument is a dict from logical name to the mesh axes that divide it in
    this call, for its collectives; every name is `()` without a mesh. `out` gives the logical axes
    of each result as a tuple, or a tuple of tuples for several results.
    """
    sharded: dict[str, tuple[str, ...]] = {}
    for names, array in zip(axes, arrays, strict=True):
        check(names)
        for name, dim in zip(names, array.shape, strict=True):
            if name is not None:
                found = mesh_axes(name, dim)
                if sharded.setdefault(name, found) != found:
                    shapes = [a.shape for a in arrays]
                    raise ValueError(f"axis {name!r} has two sizes among {shapes}")
    if not has_mesh():
        return function(sharded, *arrays)

    def spec(names: Axes) -> P:
        return P(*(sharded.get(name) or None if name else None for name in names))

    specs = tuple(map(spec, axes))
    several = bool(out) and isinstance(out[0], tuple)
    out_specs = tuple(map(spec, out)) if several else spec(out)
    mapped = jax.shard_map(
        lambda *local: function(sharded, *local),
        in_specs=specs,
        out_specs=out_specs,
        check_vma=False,  # interpreted Pallas calls need it; the sharded tests compare gradients
    )
    placed = (jax.sharding.reshard(a, s) for a, s in zip(arrays, specs, strict=True))
    return mapped(*placed)


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Gather rows of a table that may be sharded along its vocabulary. Returns x_BTD.

    Every shard finds the tokens that it holds, and the rest are zeros in the sum over shards, so
    that no more than the rows asked for ever moves.
    """

    def local(
        sharded: dict[str, tuple[str, ...]], table_VD: jax.Array, tokens_BT: jax.Array
    ) -> jax.Array:
        over = sharded["vocab"]
        if not over:
            return table_VD[tokens_BT]
        row_BT = tokens_BT - jax.lax.axis_index(over) * table_VD.shape[0]
        is_held_BT = (row_BT >= 0) & (row_BT < table_VD.shape[0])
        x_BTD = table_VD[jnp.where(is_held_BT, row_BT, 0)]
        return jax.lax.psum(jnp.where(is_held_BT[..., None], x_BTD, 0), over)

    tokens = ("batch", "seq")
    return per_shard(
        local, table_VD, tokens_BT, axes=(("vocab", None), tokens), out=(*tokens, None)
    )
