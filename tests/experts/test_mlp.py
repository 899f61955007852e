"""Every dispatch computes what every expert on every token, masked, does: value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.experts.capacity import capacity_layout
from moejax.experts.layout import dispatch_layout
from moejax.experts.mlp import expert_mlp

T, D, F, E, K = 296, 4, 6, 3, 2
DISPATCHES = {
    "dense": {"dispatch": "dense"},
    "capacity": {"dispatch": "capacity", "capacity": T},
    "dropless": {"dispatch": "dropless"},
}


def weights(activation="swiglu", dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
    wide = 2 * F if activation == "swiglu" else F
    return {
        "x": normal(keys[0], T, D),
        "wi": normal(keys[1], E, D, wide),
        "wo": normal(keys[2], E, F, D),
        "gates": normal(keys[3], T, K),
    }, normal(keys[4], T, D)


def value_and_gradients(ids, values, cotangent, wrap=lambda f: f, **options):
    def run(values):
        mlp = wrap(lambda x, ids, gates, wi, wo: expert_mlp(x, wi, wo, ids, gates, **options))
        return mlp(values["x"], ids, values["gates"], values["wi"], values["wo"])

    out, pullback = jax.vjp(run, values)
    return out, pullback(cotangent)[0]


@functools.cache
def program(dispatch, activation):
    """One compilation for all routings."""
    options = {**DISPATCHES[dispatch], "activation": activation}
    return jax.jit(functools.partial(value_and_gradients, **options))


def assert_close(ours, plain, rtol=1e-5):
    """Within ``rtol`` of the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1e-30)


def routing(kind, seed):
    """[T, K] ids; a choice that is none is E or -1."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(T, E))
    if kind == "skewed":
        scores += 3 * np.arange(E)
    elif kind == "empty expert":
        scores[:, rng.integers(E)] = -np.inf
    ids = np.argsort(-scores, axis=1)[:, :K]
    if kind == "all to one":
        ids[:, 0], ids[:, 1] = rng.integers(E), E
    elif kind == "padded":
        ids[rng.random(T) < 0.4] = E
        ids[rng.random((T, K)) < 0.2] = -1
    elif kind == "single token":
        ids[np.arange(T) != rng.integers(T)] = E
    elif kind == "nobody":
        ids[:] = E
    return jnp.asarray(ids, jnp.int32)


KINDS = ("uniform", "skewed", "all to one", "empty expert", "padded", "single token", "nobody")


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
def test_agrees_with_dense(dispatch, activation, kind, seed):
    ids = routing(kind, seed)
    ours, plain = (program(d, activation)(ids, *weights(activation)) for d in (dispatch, "dense"))
    assert_close(ours, plain)
    has_choice = np.any((ids >= 0) & (ids < E), axis=1)
    assert np.all(ours[0][~has_choice] == 0)
    assert np.all(np.asarray(ours[1]["gates"])[(ids < 0) | (ids >= E)] == 0)
    unchosen = [e for e in range(E) if not np.any(ids == e)]
    assert np.all(np.asarray(ours[1]["wi"])[unchosen] == 0)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_float64_agrees_closely(dispatch):
    with jax.enable_x64(True):
        ids, (values, cotangent) = routing("padded", 0), weights(dtype=jnp.float64)
        ours, plain = (
            jax.jit(functools.partial(value_and_gradients, **DISPATCHES[d]))(ids, values, cotangent)
            for d in (dispatch, "dense")
        )
        assert ours[0].dtype == jnp.float64
        assert_close(ours, plain, rtol=1e-12)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_tokens_without_a_choice_may_hold_nan(dispatch):
    ids, (values, cotangent) = routing("padded", 1), weights()
    alone = np.all((ids < 0) | (ids >= E), axis=1)[:, None]
    clean = program(dispatch, "swiglu")(ids, values, cotangent)
    values["x"] = jnp.where(alone, jnp.nan, values["x"])
    values["gates"] = jnp.where((ids < 0) | (ids >= E), jnp.nan, values["gates"])
    poisoned = program(dispatch, "swiglu")(ids, values, cotangent)
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_many_mostly_empty_choices(dispatch):
    """As expert choice has them: a column for every expert, and a bound on the choices."""
    keys = jax.random.split(jax.random.key(3), 5)
    experts, t = 20, 24
    normal = lambda i, *shape: jax.random.normal(keys[i], shape)
    chosen = jax.random.uniform(keys[0], (t, experts)) < 0.1
    ids = jnp.where(chosen, jnp.arange(experts)[None], experts)
    values = {
        "x": normal(1, t, D),
        "wi": normal(2, experts, D, 2 * F),
        "wo": normal(3, experts, F, D),
        "gates": normal(4, t, experts),
    }
    options = {**DISPATCHES[dispatch], "max_rows": int(chosen.sum()) + 3}
    cotangent = normal(4, t, experts)[:, :D]
    ours, plain = (
        jax.jit(functools.partial(value_and_gradients, **o))(ids, values, cotangent)
        for o in (options, DISPATCHES["dense"])
    )
    assert_close(ours, plain)


def test_beyond_the_capacity_the_last_choices_are_dropped():
    ids = jnp.array([[0, 1], [0, 3], [0, 1], [1, 0]])
    layout = capacity_layout(ids, 3, 2)
    # Expert 0 has room for tokens 0 and 1, expert 1 for tokens 0 and 2, expert 2 is empty.
    np.testing.assert_array_equal(layout.token, [0, 1, 0, 2, 4, 4])
    np.testing.assert_array_equal(layout.row, [[0, 2], [1, 6], [6, 3], [6, 6]])
    np.testing.assert_array_equal(layout.group_sizes, [2, 2, 0])

    ids, (values, cotangent) = routing("uniform", 2), weights()
    dropping = {"dispatch": "capacity", "capacity": 100}
    run = jax.jit(functools.partial(value_and_gradients, **dropping))
    ours = run(ids, values, cotangent)
    place = (
        np.asarray(dispatch_layout(ids, E).row)
        - np.concatenate([[0], np.cumsum(np.bincount(np.asarray(ids).ravel(), minlength=E))])[
            np.asarray(ids)
        ]
    )
    assert (place >= 100).any()
    kept = jnp.where(place < 100, ids, E)
    assert_close(ours, program("dense", "swiglu")(kept, values, cotangent))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_eight_devices_equal_one(dispatch):
    with jax.enable_x64(True):
        ids, (values, cotangent) = routing("skewed", 3), weights(dtype=jnp.float64)
        options = DISPATCHES[dispatch]
        one = jax.jit(functools.partial(value_and_gradients, **options))(ids, values, cotangent)
        specs = {"in_specs": (P("data"),) * 3 + (P(),) * 2, "out_specs": P("data")}
        wrap = lambda f: jax.shard_map(f, **specs)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            run = functools.partial(value_and_gradients, wrap=wrap, **options)
            eight = jax.device_get(jax.jit(run)(ids, values, cotangent))
        assert_close(eight, jax.device_get(one), rtol=1e-9)


def test_under_scan_and_remat():
    ids, (values, cotangent) = routing("padded", 4), weights()
    layers = {name: jnp.stack([values[name], values[name][::-1]]) for name in ("wi", "wo")}

    def loss(x, layers, dispatch):
        @jax.checkpoint
        def layer(x, weights):
            out = expert_mlp(x, weights["wi"], weights["wo"], ids, values["gates"], **dispatch)
            return x + out / 10, None

        return (jax.lax.scan(layer, x, layers)[0] * cotangent).sum()

    ours, plain = (
        jax.jit(jax.value_and_grad(functools.partial(loss, dispatch=DISPATCHES[d]), (0, 1)))(
            values["x"], layers
        )
        for d in ("dropless", "dense")
    )
    assert_close(ours, plain)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_the_backward_scatters_no_rows_and_sorts_no_floats(dispatch):
    values, cotangent = weights()
    run = functools.partial(value_and_gradients, **DISPATCHES[dispatch])
    jaxpr = jax.make_jaxpr(run)(routing("uniform", 0), values, cotangent)
    names = set()
    for eqn in equations(jaxpr.jaxpr):
        names.add(eqn.primitive.name)
        if "scatter" in eqn.primitive.name:
            assert all(jnp.issubdtype(v.aval.dtype, jnp.integer) for v in eqn.invars)
            assert all(v.aval.ndim < 2 for v in eqn.outvars)
        if eqn.primitive.name == "sort":
            assert all(jnp.issubdtype(v.aval.dtype, jnp.integer) for v in eqn.invars)
    assert {"gather", "dot_general", "sort"} <= names


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for entry in param if isinstance(param, (tuple, list)) else (param,):
                inner = getattr(entry, "jaxpr", entry)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dispatch": "sparse"}, "no dispatch 'sparse'"),
        ({"dispatch": "capacity"}, "capacity of at least 1"),
        ({"activation": "relu"}, "no activation 'relu'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    values, _ = weights()
    with pytest.raises(ValueError, match=message):
        expert_mlp(
            values["x"],
            values["wi"],
            values["wo"],
            routing("uniform", 0),
            values["gates"],
            **options,
        )
