"""Contrastive losses against their definitions, by hand and some rows at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.contrastive import LOSSES, Pairs, capped_exp, pair_losses, to_unit

ONE, ZERO = jnp.float32(1), jnp.float32(0)


def pairs(image, text, ids=None, valid=None, clusters=None) -> Pairs:
    count = len(image)
    whole = lambda x, other: jnp.asarray(other if x is None else x, jnp.int32)
    ids, clusters = whole(ids, np.arange(count)), whole(clusters, np.zeros(count))
    valid = jnp.ones(count, bool) if valid is None else jnp.asarray(valid)
    rows = lambda x: jnp.asarray(x, jnp.float32)
    return Pairs(rows(image), rows(text), ids, clusters, valid)


def drawn(count=8, ids=None, valid=None) -> Pairs:
    rng = np.random.default_rng(0)
    image, text = (to_unit(jnp.asarray(rng.normal(size=(count, 5)))) for _ in range(2))
    return pairs(image, text, ids, valid)


def nats(of: Pairs, kind, scale=ONE, bias=ZERO, **options):
    return pair_losses(of, of, scale, bias, kind=kind, **options)[0]


def test_equal_embeddings_cost_the_logarithm_of_their_number():
    constant = np.ones((6, 3))
    np.testing.assert_allclose(nats(pairs(constant, constant), "clip"), math.log(6), rtol=1e-6)


def test_clip_by_hand():
    """Logits log [[2, 1], [1, 4]] (rows are pictures): the right ones have 2/3, 4/5; 2/3, 4/5."""
    log_2, log_4 = math.log(2), math.log(4)
    of = pairs(np.eye(2), [[log_2, 0], [0, log_4]])
    np.testing.assert_allclose(nats(of, "clip"), [math.log(3 / 2), math.log(5 / 4)], rtol=1e-6)
    # A scale of 2 squares the odds; a bias changes nothing.
    squared = nats(of, "clip", jnp.float32(2), jnp.float32(-7))
    np.testing.assert_allclose(squared, [math.log(5 / 4), math.log(17 / 16)], rtol=1e-4)
    # The texts of logits log [[2, 1], [3, 4]] have 2/3 and 4/7, their pictures 2/5 and 4/5.
    of = pairs(np.eye(2), [[log_2, math.log(3)], [0, log_4]])
    expected = [math.log(3 / 2) + math.log(5 / 2), math.log(7 / 4) + math.log(5 / 4)]
    np.testing.assert_allclose(nats(of, "clip"), np.asarray(expected) / 2, rtol=1e-6)


def test_clip_of_several_positives_is_their_mean():
    """Pictures 0 and 1 have two right texts each, of probabilities 1/2, 1/4 and 1/3, 1/3."""
    logits = np.log([[2, 1, 1], [1, 1, 1], [1, 1, 6]])
    of = pairs(np.eye(3), logits.T, ids=[4, 4, 2])
    texts = [(math.log(2) + math.log(4)) / 2, math.log(3), math.log(8 / 6)]
    pictures = [(math.log(2) + math.log(4)) / 2, math.log(3), math.log(8 / 6)]
    expected = (np.asarray(texts) + pictures) / 2
    np.testing.assert_allclose(nats(of, "clip"), expected, rtol=1e-6)
    # No better than the logarithm of their number, where both have one half.
    best = pairs(9 * np.eye(3)[[0, 0, 2]], 9 * np.eye(3)[[0, 0, 2]], ids=[4, 4, 2])
    np.testing.assert_allclose(nats(best, "clip"), [math.log(2), math.log(2), 0], atol=1e-6)


def test_siglip_by_hand():
    """Logits log [[3, 1], [1, 1/3]]: yes with 3/4, no with 1/2; no with 1/2, yes with 1/4."""
    of = pairs(np.eye(2), [[math.log(3), 0], [0, -math.log(3)]])
    expected = [math.log(4 / 3) + math.log(2), math.log(2) + math.log(4)]
    np.testing.assert_allclose(nats(of, "siglip"), expected, rtol=1e-6)
    # All belong together: the others are yes with 1/2, as well.
    same = nats(of._replace(ids=jnp.zeros(2, jnp.int32)), "siglip")
    np.testing.assert_allclose(same, expected, rtol=1e-6)
    # A bias of log 2 makes the odds 6, 2; 2, 2/3.
    biased = nats(of, "siglip", bias=jnp.float32(math.log(2)))
    expected = [math.log(7 / 6) + math.log(3), math.log(3) + math.log(5 / 2)]
    np.testing.assert_allclose(biased, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_order_and_sides_do_not_matter(kind):
    of = drawn(ids=[0, 1, 2, 0, 3, 4, 1, 5])
    order = np.random.default_rng(1).permutation(8)
    plain = nats(of, kind)
    moved = nats(jax.tree.map(lambda x: x[order], of), kind)
    np.testing.assert_allclose(moved, plain[order], rtol=1e-5)
    turned = nats(of._replace(image=of.text, text=of.image), kind)
    np.testing.assert_allclose(turned.sum(), plain.sum(), rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("kind", LOSSES)
def test_in_parts_it_is_the_same_in_value_and_gradient(kind, chunk):
    of = drawn(ids=[0, 1, 2, 0, 3, 4, 1, 5], valid=[True] * 6 + [False, True])
    cotangent = jnp.asarray(np.random.default_rng(2).random(8), jnp.float32)

    def total(image, text, scale, bias, **options):
        own = of._replace(image=image, text=text)
        found, hit = pair_losses(own, own, scale, bias, kind=kind, **options)
        return (found * cotangent).sum(), (found, hit)

    def run(**options):
        arguments = (of.image, of.text, jnp.float32(3), jnp.float32(-2))
        run = lambda *x: total(*x, **options)
        return jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)

    whole, parts = run(), run(chunk=chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, whole)
    assert np.abs(whole[1][0]).min() >= 0 and np.abs(whole[1][2]) > 1e-3
    # Logits of a part alone.
    program = str(jax.make_jaxpr(lambda of: nats(of, kind, chunk=chunk))(of))
    assert "f32[8,8]" not in program and "f32[8,8]" in str(
        jax.make_jaxpr(lambda of: nats(of, kind))(of)
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_some_rows_against_all(kind):
    of = drawn(ids=[0, 1, 2, 0, 3, 4, 1, 5])
    two = jax.tree.map(lambda x: x[2:4], of)
    found = pair_losses(two, of, ONE, ZERO, kind=kind)
    whole = pair_losses(of, of, ONE, ZERO, kind=kind)
    for part, all_rows in zip(found, whole, strict=True):
        np.testing.assert_allclose(part, all_rows[2:4], rtol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_rows_that_fill_up_are_no_negatives(kind):
    ids, valid = [0, 1, 0, 2, 0, 3], [True] * 4 + [False] * 2
    of = drawn(6, ids, valid)
    without = jax.tree.map(lambda x: x[:4], of)
    np.testing.assert_allclose(nats(of, kind)[:4], nats(without, kind), rtol=1e-5)

    def counted(image, text):
        return jnp.where(of.valid, nats(of._replace(image=image, text=text), kind), 0).sum()

    for gradient in jax.grad(counted, argnums=(0, 1))(of.image, of.text):
        assert np.isfinite(gradient).all()
        assert (gradient[4:] == 0).all() and (gradient[:4] != 0).any(axis=1).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_rows_of_other_clusters_are_not_compared(kind):
    """Each cluster by itself, whatever the positives of the other; and no gradient between them."""
    of = drawn(6, [0, 1, 0, 2, 0, 3])._replace(clusters=jnp.asarray([0, 1, 0, 1, 1, 0]))
    found = nats(of, kind)
    for cluster in (0, 1):
        mine = np.flatnonzero(np.asarray(of.clusters) == cluster)
        alone = jax.tree.map(lambda x, mine=mine: x[mine], of)
        np.testing.assert_allclose(found[mine], nats(alone, kind), rtol=1e-5)
    first = lambda text: nats(of._replace(text=text), kind)[0]
    moved = np.abs(jax.grad(first)(of.text)).max(axis=1) > 0
    assert moved.tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_hit_is_a_picture_whose_likeliest_text_is_a_positive(kind):
    """All three pictures like text 1 best: right for 1, and for 2 if it has the id of 1."""
    logits = [[1.0, 2, 0], [0, 2, 1], [0, 2, 1]]
    hits = lambda ids: pair_losses(
        of := pairs(np.eye(3), np.transpose(logits), ids), of, ONE, ZERO, kind=kind
    )[1].tolist()
    assert hits([0, 1, 2]) == [0, 1, 0]
    assert hits([0, 1, 1]) == [0, 1, 1]


def test_a_capped_scale_comes_back():
    value = jax.value_and_grad(lambda x, sign: sign * capped_exp(x, 100.0))
    below, above = jnp.float32(math.log(10)), jnp.float32(math.log(150))
    for sign in (1.0, -1.0):
        np.testing.assert_allclose(value(below, sign), [10 * sign] * 2, rtol=1e-5)
    # Descent lowers the logarithm where the gradient is positive.
    np.testing.assert_allclose(value(above, 1.0), [100, 100], rtol=1e-5)
    np.testing.assert_allclose(value(above, -1.0), [-100, 0], rtol=1e-5)


def test_unit_rows():
    rows = to_unit(jnp.asarray([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)
