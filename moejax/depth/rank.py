"""Which layers' attention says little (gamma-MoD, arXiv 2410.13859): its rank, and a proposal."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention_rank(
    maps_bntt: Float[Array, "b n t t"], valid_bt: Bool[Array, "b t"]
) -> Float[Array, " b"]:
    """The mean over the heads of the rank of what lies below the diagonal of an attention map.

    The mean of it over samples is gamma-MoD's ARank. Tokens that are not valid count for nothing,
    neither as rows nor as columns; a row of several packed segments counts as one sample.

    A singular value counts above ``largest * tokens * eps``, as in ``matrix_rank``, with the eps of
    float32 and the valid tokens of the row. That decides it all: no weight of a softmax is zero, so
    in exact numbers the rank is one less than the tokens, whatever the layer does. In wider floats
    too, smaller values are rounding of weights that are made in float32.
    """
    valid_bntt = (valid_bt[:, :, None] & valid_bt[:, None, :])[:, None]
    below = jnp.where(valid_bntt, jnp.tril(maps_bntt, -1), 0)
    values_bnt = jnp.linalg.svd(below, compute_uv=False)
    relative_b = valid_bt.sum(axis=1) * jnp.finfo(jnp.float32).eps
    largest_bn1 = values_bnt.max(axis=-1, keepdims=True)
    return (values_bnt > largest_bn1 * relative_b[:, None, None]).sum(axis=-1).mean(axis=-1)


def layers_of_lowest_rank(ranks: Mapping[int, float], number: int) -> tuple[int, ...]:
    """So many layers of the lowest rank, in their order; of equal ranks the later layer."""
    in_order = sorted(ranks, key=lambda layer: (ranks[layer], -layer))
    return tuple(sorted(in_order[: max(number, 0)]))


def shortest_pattern(
    kinds: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(first blocks, a period, last blocks): ``kinds`` with the fewest of them named.

    The period is repeated between the others, and may break off.
    """
    total = len(kinds)
    found = []
    for start in range(total):
        for period in range(1, total - start + 1):
            end = start + period
            while end < total and kinds[end] == kinds[end - period]:
                end += 1
            found.append((start + period + total - end, start, period, end))
    _, start, period, end = min(found)
    return tuple(kinds[:start]), tuple(kinds[start : start + period]), tuple(kinds[end:])
