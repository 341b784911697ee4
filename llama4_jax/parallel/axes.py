"""The vocabulary of shapes: what the letters in names mean, and the closed list of logical axes.

An array's name ends in its dimensions (`q_BTNH`):

    B batch   T query tokens   S key tokens   D embed     N query heads   K kv heads   H head dim
    F hidden  E experts        X experts per token        R routed rows   V vocabulary
    L layers  G layer groups   P patches or tiles         I inputs of one patch        C channels

Logical axes say what a dimension is for; `rules.py` alone says which mesh axes divide it.
"""

AXES = {
    "batch": "rows of a batch",
    "seq": "tokens of a row, in a forward pass over whole rows",
    "kv_seq": "slots of a NoPE layer's cache",
    "tiles": "image tiles",
    "embed": "the residual stream; never sharded while it is computed with",
    "weight_embed": "the embed dimension of a weight at rest; gathered where the weight is used",
    "expert_embed": "the same of a routed expert's weight, whose experts are sharded already",
    "q_heads": "query heads",
    "kv_heads": "key and value heads",
    "head_dim": "features of one head",
    "mlp": "hidden features of a dense MLP or shared expert",
    "experts": "routed experts",
    "expert_mlp": "hidden features of a routed expert",
    "vocab": "the vocabulary",
}

Axes = tuple[str | None, ...]


def check(axes: Axes) -> None:
    """Raise ValueError if `axes` holds a name that is not in the list."""
    for name in axes:
        if name is not None and name not in AXES:
            raise ValueError(f"unknown logical axis {name!r}; choose one of {', '.join(AXES)}")
