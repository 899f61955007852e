"""What makes the ``moma`` config MoMa: experts of a modality, which choose from the whole batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.api import build
from moejax.config import load_config
from moejax.config.moe import RouterConfig
from moejax.config.options import Options
from moejax.surgery import init_from
from moejax.train.checkpoint import Checkpoints
from moejax.train.leaves import named_leaves
from moejax.train.setup import prepare_model
from moejax.train.start import plan_start

TEXT, IMAGE = slice(0, 4), slice(4, 8)


def has(aux) -> np.ndarray:
    """[row, token, expert]: whether the expert has the token."""
    return (aux["expert_ids"][..., None] == np.arange(8)).any(axis=-2)


def test_experts_choose_tokens_of_their_modality(expert_layer, tokens, mixed):
    """Each of four takes a quarter of its modality's tokens in the batch; nothing leaks between."""
    layer = expert_layer("moma")
    _, aux = layer(tokens, mixed, train=True)
    text, taken = mixed == 0, has(aux)
    # 8 text tokens, 6 of them in row 0, and 16 of pictures: 2 and 4 for each expert.
    np.testing.assert_array_equal(taken.sum(axis=(0, 1)), [2] * 4 + [4] * 4)
    assert not taken[text][:, IMAGE].any() and not taken[~text][:, TEXT].any()
    scores = jax.nn.sigmoid(tokens @ layer.params["router"]["router_mde"][0])
    np.testing.assert_allclose(
        aux["weights"].sum(axis=-1), np.where(taken, scores, 0).sum(axis=-1), rtol=1e-5
    )
    # Exact zeros: pictures' experts and their columns of the router, from outputs of text.
    for modality, others in ((0, IMAGE), (1, TEXT)):
        of = np.nonzero(mixed == modality)
        gradient = layer.gradient(layer.params, tokens, mixed, of=of)
        for leaf in (*gradient["experts"].values(), gradient["router"]["router_mde"][0].T):
            assert np.all(leaf[others] == 0)
            assert np.any(leaf != 0)

    shared = expert_layer("moma", allowed=())
    taken = has(shared(tokens, mixed, train=True)[1])
    assert taken[text][:, IMAGE].any()
    tokens_choose = expert_layer("moma", router=RouterConfig("top_k"), top_k=1)
    counts = has(tokens_choose(tokens, mixed, train=True)[1]).sum(axis=(0, 1))
    assert counts.max() > 4 and counts.sum() == 24


def test_choice_depends_on_the_batch_and_that_of_causal_routers_does_not(
    expert_layer, tokens, mixed
):
    """Row 1 changes; which experts row 0 has changes with it, but not by its causal routers."""
    other = tokens.at[1].multiply(4.0)
    layer = expert_layer("moma:aux")
    in_training, alone = (
        [has(layer(x, mixed, train=train)[1])[0] for x in (tokens, other)]
        for train in (True, False)
    )
    assert np.any(in_training[0] != in_training[1])
    np.testing.assert_array_equal(*alone)
    # They say who, the main routers how much.
    _, aux = layer(tokens, mixed)
    scores = np.array(jax.nn.sigmoid(tokens @ layer.params["router"]["router_mde"][0]))
    np.testing.assert_allclose(
        aux["weights"].sum(axis=-1), np.where(has(aux), scores, 0).sum(axis=-1), rtol=1e-5
    )
    by_sequence = expert_layer("moma", routing_group=1)
    rows = [has(by_sequence(x, mixed, train=True)[1])[0] for x in (tokens, other)]
    np.testing.assert_array_equal(*rows)


@pytest.fixture
def decoder(experts_tiny, drawn):
    """``decoder("moma:aux")``: (config, model, objective, random parameters), tiny."""

    def make(name: str, **overrides):
        config = load_config(name, {**experts_tiny(name), **overrides})
        return config, *(built := build(config)), drawn(built[0], config)

    return make


def test_logits_are_causal_with_causal_routers(decoder, tiny_batch, mixed):
    """A later token changes nothing before it; with the choice of training it does."""
    batch = tiny_batch(mixed)
    later = {**batch, "tokens": batch["tokens"].copy()}
    later["tokens"][:, 8:] = 17
    for name, causal in (("moma:aux", True), ("moma", False)):
        _, model, _, params = decoder(name)
        apply = jax.jit(lambda p, b, model=model: model.apply({"params": p}, b).logits)
        same = np.array_equal(apply(params, batch)[:, :8], apply(params, later)[:, :8])
        assert same == causal, name


def test_loss_of_causal_routers_reaches_them_alone(decoder, tiny_batch, mixed):
    config, model, objective, params = decoder("moma:aux")
    batch = tiny_batch(mixed)
    batch |= {"targets": batch["tokens"], "weights": np.ones((2, 12), np.float32)}
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(params):
        sums = objective(model.apply({"params": params}, batch, train=True), batch)
        return sums.total() - sum(c * sums.mean(name) for name, c in sums.coefficients)

    for name, leaf in named_leaves(jax.jit(jax.grad(loss))(params)).items():
        assert np.any(leaf != 0) == ("causal_router" in name), name
    # And training with it changes nothing else.
    frozen = prepare_model(config, jax.devices()[:1]).recipe.optimizer.frozen
    for name, mask in named_leaves(frozen).items():
        assert mask is ("causal_router" not in name), name


def test_one_expert_a_modality_is_an_untied_layer(decoder, tiny_batch, mixed):
    """1t1i: no gate, no choice; the same as a feed-forward layer of each modality's own."""
    _, model, _, params = decoder("moma:1t1i")
    _, untied, _, _ = decoder("chameleon", **{"model.untie.ffn": True, "model.ffn_hidden": (16,)})
    block = params["stack"]["segment_0"]["block_0"]
    experts = block["moe"]["experts"]
    rest = {name: leaf for name, leaf in block.items() if name != "moe"}
    ffn = {"wi_mdf": experts["wi_edf"], "wo_mfd": experts["wo_efd"]}
    same = {**params, "stack": {"segment_0": {"block_0": {**rest, "ffn": ffn}}}}
    logits, expected = (
        jax.jit(m.apply)({"params": p}, tiny_batch(mixed)).logits
        for m, p in ((model, params), (untied, same))
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_upcycled_experts_are_copies_of_their_seed(experts_tiny, tmp_path, mixed, tiny_batch):
    """Eight experts from two; routed to one of them with weight 1, a token gets what it got."""
    tiny = experts_tiny("moma")
    seed = prepare_model(load_config("moma:1t1i", tiny), jax.devices()[:1])
    saved = seed.recipe.create()
    checkpoints = Checkpoints(tmp_path / "seed/checkpoints")
    checkpoints.save(1, saved, {}, seed.mesh)
    checkpoints.close()
    # On devices that hold four of the eight experts each.
    here = {"train.init_from": str(tmp_path / "seed"), "mesh.data": 1, "mesh.expert": 2}
    config = load_config("moma:upcycle", {**tiny, **here})
    setup = prepare_model(config, jax.devices()[:2])
    start = plan_start(setup, tmp_path / "new")
    assert start is not None
    params = start.create(setup.recipe).params

    name = "stack/segment_0/block_0/moe/experts/wi_edf"
    assert start.plan.loads[name] == init_from.Load(name, (0, 0, 0, 0, 1, 1, 1, 1), 1)
    skipped = "stack/segment_0/block_0/moe/router/router_mde"
    assert start.plan.skipped == {skipped: "[2,1,16,2] there, [2,1,16,8] here"}
    old, new = (named_leaves(tree) for tree in (saved.params, params))
    for key in (name, name.replace("wi_edf", "wo_efd")):
        np.testing.assert_array_equal(new[key], np.repeat(old[key], 4, axis=1))

    # In the choice of the paper outputs are weighed by scores, so equality needs a weight of 1.
    router = RouterConfig("top_k", Options(renormalise=True))
    moe = dataclasses.replace(config.model.moe, router=router, top_k=1)
    forced = build(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe)))[0]
    logits, expected = (
        jax.jit(m.apply)({"params": jax.device_get(p)}, tiny_batch(mixed)).logits
        for m, p in ((forced, params), (seed.model, saved.params))
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_upcycled_runs_choose_with_noise(expert_layer, tokens, mixed):
    """Gumbel-sigmoid in training: other choices with other keys, none outside of it."""
    layer = expert_layer("moma:upcycle")
    draws = [has(layer(tokens, mixed, train=True, rng=jax.random.key(i))[1]) for i in range(2)]
    assert np.any(draws[0] != draws[1])
    for taken in draws:
        np.testing.assert_array_equal(taken.sum(axis=(0, 1)), [2] * 4 + [4] * 4)
    plain = [has(layer(tokens, mixed, rng=jax.random.key(i))[1]) for i in range(2)]
    np.testing.assert_array_equal(*plain)
