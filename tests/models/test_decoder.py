"""The decoder: reductions to dense, isolation of towers, causality, packing, equal executions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.schema import UntieConfig
from moejax.models.decoder import build_decoder

PLACEMENTS = ("post_branch", "pre")


def spread(dense_params, mot_params):
    """Dense weights, repeated along the modality axis where the other model has more towers."""
    return jax.tree.map(lambda d, m: jnp.broadcast_to(d, m.shape), dense_params, mot_params)


def tower(params, shapes, index: int):
    """The dense weights that tower ``index`` holds."""

    def one(leaf, shape):
        axis = [i for i, (a, b) in enumerate(zip(leaf.shape, shape.shape, strict=True)) if a != b]
        return leaf if not axis else jnp.take(leaf, jnp.array([index]), axis=axis[0])

    return jax.tree.map(one, params, shapes)


def distinct(params):
    """Other values in every leaf, so that towers and norm scales differ."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_mot_with_equal_towers_is_the_dense_model(tiny, batch, untied, placement):
    dense = tiny(norm_placement=placement)
    mot = tiny(norm_placement=placement, untie=untied)
    params = distinct(dense.params)
    expected = dense.logits(params, batch)
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 2, batch["modality"].shape, np.int32)
        got = mot.logits(spread(params, mot.params), {**batch, "modality": ids})
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("present", [0, 1])
def test_one_modality_is_that_towers_dense_model(tiny, batch, untied, present):
    dense, mot = tiny(), tiny(untie=untied)
    params = distinct(mot.params)
    batch = {**batch, "modality": np.full_like(batch["modality"], present)}
    expected = dense.logits(tower(params, dense.params, present), batch)
    np.testing.assert_allclose(mot.logits(params, batch), expected, atol=1e-5)


def test_towers_of_absent_modalities_get_exactly_zero_gradient(tiny, batch, untied):
    mot = tiny(untie=untied)
    params = distinct(mot.params)
    cotangent = np.random.default_rng(0).normal(size=(2, 24, 80)).astype(np.float32)
    batch = {**batch, "modality": np.zeros_like(batch["modality"])}
    gradients = mot.gradients(params, batch, cotangent)
    leaves = jax.tree_util.tree_leaves_with_path(gradients["stack"])
    leaves.append(((), gradients["final_norm"]["scale_md"][None]))
    for path, leaf in leaves:
        assert leaf.shape[1] == 2, f"{path} is not untied"
        assert np.all(leaf[:, 1] == 0), f"{path}: the absent tower has a gradient"
        assert np.any(leaf[:, 0] != 0), f"{path}: the present tower has none"


def test_image_tower_reaches_text_only_through_attention(tiny, untied):
    """Text before the first image token cannot depend on the image tower; later text does."""
    mot = tiny(untie=untied)
    length, first_image = 24, 10
    modality = np.zeros((1, length), np.int32)
    modality[:, first_image : first_image + 6] = 1
    batch = {
        "tokens": np.arange(20, 20 + length, dtype=np.int32)[None],
        "modality": modality,
        "segments": np.ones((1, length), np.int32),
        "positions": np.arange(length, dtype=np.int32)[None],
    }
    changed = jax.tree.map(
        lambda leaf: leaf.at[:, 1].add(0.1) if leaf.ndim > 1 and leaf.shape[1] == 2 else leaf,
        mot.params["stack"],
    )
    before = mot.logits(mot.params, batch)
    after = mot.logits({**mot.params, "stack": changed}, batch)
    np.testing.assert_array_equal(before[:, :first_image], after[:, :first_image])
    assert np.abs(before - after)[:, first_image + 6 :].max() > 1e-3


def test_grouped_path_equals_the_dense_mask_reference(tiny, batch, untied):
    grouped = tiny(untie=untied, kernel_backend="xla")
    reference = tiny(untie=untied, kernel_backend="reference")
    params = distinct(grouped.params)
    np.testing.assert_allclose(
        grouped.logits(params, batch), reference.logits(params, batch), atol=1e-5
    )
    cotangent = np.random.default_rng(1).normal(size=(2, 24, 80)).astype(np.float32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        grouped.gradients(params, batch, cotangent),
        reference.gradients(params, batch, cotangent),
    )


def test_relabelling_modalities_with_their_towers_changes_nothing(tiny, batch, untied):
    mot = tiny(untie=untied)
    params = distinct(mot.params)
    flip = lambda leaf: leaf[:, ::-1] if leaf.ndim > 1 and leaf.shape[1] == 2 else leaf
    flipped = {
        **params,
        "stack": jax.tree.map(flip, params["stack"]),
        "final_norm": {"scale_md": params["final_norm"]["scale_md"][::-1]},
    }
    np.testing.assert_allclose(
        mot.logits(flipped, {**batch, "modality": 1 - batch["modality"]}),
        mot.logits(params, batch),
        atol=1e-5,
    )


def test_three_modalities_and_each_flag_alone(tiny_config, tiny_batch):
    """Each flag adds exactly its own matrices for each further modality."""
    sizes = {"qkv": 32 * 8 * 8, "out": 32 * 32, "ffn": 32 * 48 * 3, "norms": 2 * 32 + 2 * 8}
    names = ("text", "image", "speech")

    def count(untie):
        model = build_decoder(tiny_config(modalities=names, untie=untie))
        shapes = jax.eval_shape(model.init, jax.random.key(0), tiny_batch())
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    shared = count(UntieConfig())
    for flag, size in sizes.items():
        assert count(UntieConfig(**{flag: True})) - shared == 2 * 2 * size, flag
    assert count(UntieConfig(final_norm=True)) - shared == 2 * 32


def test_towers_of_unequal_width(tiny, batch):
    """With the wider tower's extra columns at zero, it is the narrow model."""
    untie = UntieConfig(ffn=True)
    equal, unequal = tiny(untie=untie), tiny(untie=untie, ffn_hidden=(48, 64))
    narrow = distinct(equal.params)
    wide = jax.tree.map(lambda leaf: leaf, narrow)
    for block in wide["stack"]["segment_0"].values():
        wi, wo = block["ffn"]["wi_mdf"], block["ffn"]["wo_mfd"]
        gate, up = jnp.split(wi[:, 1:], 2, axis=-1)
        pad = ((0, 0), (0, 0), (0, 0), (0, 16))
        block["ffn"] = {
            "wi_mdf_text": wi[:, :1],
            "wo_mfd_text": wo[:, :1],
            "wi_mdf_image": jnp.concatenate([jnp.pad(gate, pad), jnp.pad(up, pad)], axis=-1),
            "wo_mfd_image": jnp.pad(wo[:, 1:], ((0, 0), (0, 0), (0, 16), (0, 0))),
        }
    np.testing.assert_allclose(unequal.logits(wide, batch), equal.logits(narrow, batch), atol=1e-5)


@pytest.mark.parametrize("flags", [{}, {"untie": "all"}])
def test_no_token_sees_a_later_one_or_another_segment(tiny, batch, untied, flags):
    model = tiny(untie=untied) if flags else tiny()
    embed = model.params["embedding_vd"]

    def logit_sum(table, row, position):
        params = {**model.params, "embedding_vd": table}
        return model.logits(params, batch)[row, position].sum()

    # Token ids that occur once: the gradient of their embedding is the token's influence.
    batch["tokens"] = np.arange(16, 16 + 48, dtype=np.int32).reshape(2, 24)
    influence = jax.grad(logit_sum)(embed, 0, 15)
    seen = np.abs(influence[batch["tokens"]]).sum(axis=-1) > 0
    expected = np.zeros_like(seen)
    expected[0, 12:16] = True  # the second segment starts at 12
    np.testing.assert_array_equal(seen, expected)


def test_packing_equals_separate_rows(tiny, batch, untied):
    model = tiny(untie=untied)
    packed = model.logits(model.params, batch)
    alone = {name: batch[name][:, 12:22] for name in batch}
    np.testing.assert_allclose(model.logits(model.params, alone), packed[:, 12:22], atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}], ids=str
)
def test_unrolled_and_rematerialised_equal_the_scan(float64, tiny, batch, untied, change):
    pattern = {"untie": untied, "num_layers": 3, "first_blocks": ("dense",), "dtype": "float64"}
    pattern["block_pattern"] = ("untied", "dense")
    base, other = tiny(**pattern), tiny(**pattern, **change)
    cotangent = np.random.default_rng(2).normal(size=(2, 24, 80)).astype(np.float32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9, rtol=1e-9),
        base.gradients(base.params, batch, cotangent),
        other.gradients(base.params, batch, cotangent),
    )


def test_layers_of_a_pattern_are_what_it_says(tiny, untied):
    """dense, then untied and dense in turn, then dense: towers only in the untied layers."""
    model = tiny(
        untie=untied,
        num_layers=6,
        first_blocks=("dense",),
        block_pattern=("untied", "dense"),
        last_blocks=("dense",),
    )
    towers = []
    for segment in model.params["stack"].values():
        blocks = [block["ffn"]["wi_mdf"] for _, block in sorted(segment.items())]
        towers += [leaf.shape[1] for layer in range(len(blocks[0])) for leaf in blocks]
    assert towers == [1, 2, 1, 2, 1, 1]


def test_bfloat16_stays_close_and_logits_are_float32(tiny, batch, untied):
    exact, half = tiny(untie=untied), tiny(untie=untied, dtype="bfloat16")
    logits = half.logits(exact.params, batch)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half.params))
    difference = np.abs(logits - exact.logits(exact.params, batch))
    assert difference.max() < 0.1


def test_dropout_acts_in_training_only(tiny, batch):
    model = tiny(dropout=0.5)
    apply = lambda key, train: (
        model.model.apply(
            {"params": model.params}, batch, train=train, rngs={"dropout": jax.random.key(key)}
        ).logits
    )
    np.testing.assert_array_equal(apply(0, False), apply(1, False))
    assert np.abs(apply(0, True) - apply(1, True)).max() > 0.1


def test_config_of_unknown_block_is_refused(tiny):
    from moejax.errors import UserError

    with pytest.raises(UserError, match="model.block_pattern: no block 'untie'.*'untied'"):
        tiny(block_pattern=("untie",))


def test_config_is_hashable_and_replaceable(tiny):
    config = tiny().config
    assert hash(config) == hash(dataclasses.replace(config))
