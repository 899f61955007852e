"""Ways for tokens to meet experts on other devices, against every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.experts.dense import dense_mlp
from moejax.parallel.exchange import EXCHANGES, Tokens, choose_exchange, exchange, places_for

DEVICES, T, D, F, E, K = 4, 12, 3, 2, 8, 2
NUM_LOCAL = E // DEVICES


def operands(kind):
    rng = np.random.default_rng(0)
    ids = {
        "uniform": np.argsort(rng.random((T, E)), axis=1)[:, :K],
        # Everything to the two experts of one device.
        "one": np.tile([4, 5], (T, 1)),
        # -1 and E are no choice; experts 0 to 5 have no token.
        "few": np.where(rng.random((T, K)) < 0.5, rng.choice([6, 7], (T, K)), [-1, E]),
    }[kind]
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    return (
        normal(T, D),
        jnp.asarray(ids, jnp.int32),
        normal(T, K),
        normal(E, D, 2 * F),
        normal(E, F, D),
    )


def dense(x, ids, gates, wi, wo):
    return dense_mlp(x, wi, wo, ids, gates, "swiglu")


@functools.cache
def exchanged(name, buffer):
    """The same on four devices, each with a quarter of the tokens and of the experts."""
    mesh = jax.make_mesh(
        (DEVICES,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )

    def local(x, ids, gates, wi, wo):
        def run(tokens):
            return dense_mlp(tokens.x_td, wi, wo, tokens.ids, tokens.gates, "swiglu")

        return exchange(name, run, Tokens(x, ids, gates), wi.shape[0], buffer)

    own = P() if name == "replicated" else P("expert")
    experts = P() if name == "fsdp" else P("expert")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(own, own, own, experts, experts), out_specs=own
    )

    @jax.jit
    def run(x, ids, gates, wi, wo, cotangent):
        out, pullback, run_ids = jax.vjp(
            lambda *some: mapped(some[0], ids, *some[1:]), x, gates, wi, wo, has_aux=True
        )
        return run_ids, out, pullback(cotangent)

    return run


@pytest.mark.parametrize("name", EXCHANGES)
def test_every_exchange_gives_the_sums_of_the_experts_and_their_gradients(name):
    with jax.enable_x64(True):
        for kind in ("uniform", "one", "few"):
            x, ids, gates, wi, wo = operands(kind)
            cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((T, D)))
            run_ids, *ours = exchanged(name, 0.0)(x, ids, gates, wi, wo, cotangent)
            np.testing.assert_array_equal(run_ids, ids)
            of_ids = functools.partial(dense, ids=ids)
            out, pullback = jax.vjp(
                lambda x, gates, wi, wo, of_ids=of_ids: of_ids(x, gates=gates, wi=wi, wo=wo),
                *(x, gates, wi, wo),
            )
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
                tuple(ours),
                (out, pullback(cotangent)),
            )


def kept_by_buffers(name, ids, places):
    """Choices [t, k] that arrive, counted by hand: rows in the order of senders and tokens."""
    kept = np.zeros(ids.shape, bool)
    arrived = np.zeros(DEVICES, int)
    for sender in range(DEVICES):
        sent = np.zeros(DEVICES, int)
        for t in range(sender * T // DEVICES, (sender + 1) * T // DEVICES):
            for device in range(DEVICES):
                here = ids[t] // NUM_LOCAL == device
                if not here.any():
                    continue
                # all_to_all has so many places for each sender, ragged for all of them together.
                room = (
                    sent[device] < places
                    if name == "all_to_all"
                    else (arrived[device] < places * DEVICES)
                )
                kept[t] |= here & room
                sent[device] += room
                arrived[device] += room
    return kept


@pytest.mark.parametrize("name", ["all_to_all", "ragged"])
def test_what_does_not_fit_a_buffer_adds_nothing(name):
    with jax.enable_x64(True):
        x, ids, gates, wi, wo = operands("one")
        ids = ids.at[::5].set(jnp.asarray([0, 7], jnp.int32))
        places = places_for(T // DEVICES, K, DEVICES, 0.5)
        kept = kept_by_buffers(name, np.asarray(ids), places)
        assert 0 < kept.sum() < kept.size
        run_ids, out, (dx, dgates, *_) = exchanged(name, 0.5)(
            x, ids, gates, wi, wo, jnp.ones((T, D))
        )
        np.testing.assert_array_equal(run_ids, np.where(kept, ids, -1))
        expected = dense(x, jnp.where(kept, ids, -1), gates, wi, wo)
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)
        assert not np.asarray(dgates)[~kept].any()
        assert not np.asarray(dx)[~kept.any(axis=1)].any()


def test_the_volume_rule():
    sizes = {"devices": 8, "split": True, "k": 2, "width": 64}
    choose = functools.partial(choose_exchange, "auto")
    # All weights are 8 * 3 * 64 * 32 numbers; 7/8 of them travel, or 2 * 7 * 64 for each token.
    weights = 8 * 3 * 64 * 32
    assert choose(**sizes, tokens=47, weights=weights) == "ring"
    assert choose(**sizes, tokens=49, weights=weights) == "fsdp"
    # Buffers of half a quarter of the tokens beat the ring.
    assert choose(**sizes, tokens=40, weights=weights, buffer=0.5) == "all_to_all"
    assert choose(**{**sizes, "devices": 1}, tokens=1, weights=weights) == "fsdp"
    assert choose(**{**sizes, "split": False}, tokens=1, weights=weights) == "replicated"
    named = functools.partial(choose_exchange, "ragged", tokens=49, weights=weights)
    assert named(**sizes) == "ragged"
    assert named(**{**sizes, "split": False}) == "replicated"


def test_an_unknown_exchange_is_named():
    with pytest.raises(ValueError, match="no exchange 'pigeon': fsdp, ring"):
        exchange("pigeon", lambda tokens: tokens.x_td, Tokens(*operands("one")[:3]), 2)
