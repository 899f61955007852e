"""Two towers and LIMoE: who sees whom, what padding may not do, sizes of the towers, mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config.contrastive import ContrastiveConfig, LIMoEConfig, TextSizes, TwoTowersConfig
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.config.trunk import UntieConfig
from moejax.config.vision import HEADS, AugmentConfig
from moejax.errors import UserError
from moejax.models.limoe import build_limoe
from moejax.models.two_towers import build_two_towers

pytestmark = pytest.mark.usefixtures("quick_compiles")
SIDE, LENGTH, WORDS = 8, 7, 20
SIZES = {
    "image_size": SIDE,
    "patch_size": 4,
    "vocab_size": WORDS,
    "text_length": LENGTH,
    "embed_dim": 6,
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 2,
    "ffn_hidden": (24,),
    "kernel_backend": "reference",
}
# Of the whole batch, whoever comes first; nobody is dropped outside of training.
EXPERTS = MoEConfig(
    num_experts=4, top_k=1, hidden=24, routing_group=0, capacity="priority", capacity_factor=0.5
)
TOWERS = TwoTowersConfig(**SIZES)
ONE_TOWER = LIMoEConfig(**SIZES, moe=EXPERTS)
MODELS = {"two_towers": TOWERS, "limoe": ONE_TOWER}


@functools.cache
def made(config):
    """(random parameters, jitted function of parameters, a batch, and whether it is training)."""
    build = build_limoe if isinstance(config, LIMoEConfig) else build_two_towers
    model = build(config)
    boxed = jax.eval_shape(model.init, jax.random.key(0), make_batch())
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, meta.unbox(boxed)["params"])

    def apply(params, batch, train):
        rngs = {"dropout": jax.random.key(1)} if train else {}
        return model.apply({"params": params}, batch, train=train, record=True, rngs=rngs)

    return params, jax.jit(apply, static_argnums=2)


def make_batch(rows: int = 3, seed: int = 0) -> dict:
    """Texts of one word and more between their marks."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, LENGTH), np.int32)
    for i, row in enumerate(tokens):
        words = rng.integers(8, WORDS, 1 + i % (LENGTH - 2))
        row[: len(words) + 2] = [1, *words, 2]
    images = rng.integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8)
    return {"images": images, "tokens": tokens, "weights": np.ones(rows, np.float32)}


def run(config, batch, params=None, train=False):
    own, apply = made(config)
    return jax.device_get(apply(own if params is None else params, batch, train))


@pytest.mark.parametrize("name", MODELS)
def test_sides_are_seen_by_themselves(name):
    """A picture's embedding is that of the picture alone, a text's that of the text alone."""
    batch, other = make_batch(), make_batch(seed=1)
    plain = run(MODELS[name], batch)
    np.testing.assert_allclose(np.linalg.norm(plain.image, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(plain.text, axis=-1), 1, rtol=1e-5)
    texts = run(MODELS[name], {**batch, "tokens": other["tokens"]})
    np.testing.assert_allclose(texts.image, plain.image, atol=1e-5)
    assert np.abs(texts.text - plain.text).max(axis=1).min() > 1e-3
    pictures = run(MODELS[name], {**batch, "images": other["images"]})
    np.testing.assert_allclose(pictures.text, plain.text, atol=1e-5)
    assert np.abs(pictures.image - plain.image).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_words_count_with_their_places_and_padding_does_not(name, head):
    config = dataclasses.replace(MODELS[name], head=head)
    batch = make_batch(4)
    params, _ = made(config)
    plain = run(config, batch)
    turned = batch["tokens"].copy()
    turned[3, 2:4] = turned[3, [3, 2]]
    assert turned[3, 2] != turned[3, 3]
    assert np.abs(run(config, {**batch, "tokens": turned}).text[3] - plain.text[3]).max() > 1e-3
    # What padding is like has no influence.
    embedding = "text_embedding" if name == "limoe" else "embedding"
    table = params if name == "limoe" else params["text"]
    words = {**table[embedding], "embedding_vd": table[embedding]["embedding_vd"].at[0].add(5.0)}
    table = {**table, embedding: words}
    changed = table if name == "limoe" else {**params, "text": table}
    np.testing.assert_allclose(run(config, batch, changed).text, plain.text, atol=1e-5)


def test_one_tower_sees_each_kind_by_itself():
    """LIMoE: one stack for both, whose experts get patches and words, padding aside."""
    params, _ = made(ONE_TOWER)
    assert set(params["stack"]) == {"segment_0"}
    batch = make_batch()
    outputs = run(ONE_TOWER, batch)
    router = outputs.aux["segment_0"]["block_1"]["moe"]["router"]
    ids = router["expert_ids"][0]
    assert ids.shape == (3, 4 + LENGTH, 1)
    words = batch["tokens"] > 0
    assert (ids[:, :4] < 4).all() and (ids[:, 4:, 0][words] < 4).all()
    assert (ids[:, 4:, 0][~words] == 4).all()
    by_modality = np.asarray(router["statistics"]["chosen_me"][0])
    np.testing.assert_array_equal(by_modality.sum(axis=-1), [3 * 4, words.sum()])


def test_patches_and_words_compete_for_places():
    """12 patches and 12 words have 20 places: those of the highest weights, whichever they are."""
    batch = make_batch()
    trained = run(ONE_TOWER, batch, train=True)
    router = trained.aux["segment_0"]["block_1"]["moe"]["router"]
    chosen, kept = router["chosen_ids"][0, ..., 0], router["expert_ids"][0, ..., 0]
    # Places are counted for all tokens of the rows, padding too: 33 x 0.5 / 4, rounded up.
    places = 5
    weight = jax.nn.softmax(router["logits"][0], axis=-1).max(axis=-1)
    dropped = {"patches": 0, "words": 0}
    for expert in range(4):
        mine = np.argwhere(chosen == expert)
        order = sorted(map(tuple, mine), key=lambda at: -weight[at])
        for i, at in enumerate(order):
            assert (kept[at] == expert) == (i < places)
            dropped["patches" if at[1] < 4 else "words"] += i >= places
    assert sum(dropped.values()) > 0, "nobody was dropped: the test is void"


def test_the_tower_of_texts_has_sizes_of_its_own():
    text = TextSizes(num_layers=1, d_model=8, num_heads=1, ffn_hidden=12)
    config = dataclasses.replace(TOWERS, text=text)
    params, _ = made(config)
    ffn = params["text"]["stack"]["segment_0"]["block_0"]["ffn"]["wo_mfd"]
    assert ffn.shape == (1, 1, 12, 8)
    assert params["image"]["stack"]["segment_0"]["block_0"]["ffn"]["wo_mfd"].shape == (2, 1, 24, 16)
    assert params["head"]["text_dz"].shape == (8, 6)
    assert run(config, make_batch()).text.shape == (3, 6)


def test_the_tower_of_texts_has_a_first_and_a_last_block_of_its_own():
    """As pictures have them: experts "last n" of a tower are not a matter of its pattern."""
    text = TextSizes(num_layers=4, first_blocks=("untied",), last_blocks=("moe",))
    config = dataclasses.replace(TOWERS, moe=EXPERTS, text=text)
    assert config.text_tower.block_kinds() == ("untied", "dense", "dense", "moe")
    assert config.block_kinds() == ("dense", "dense")
    with pytest.raises(UserError, match="model.text.first_blocks: first and last blocks are more"):
        dataclasses.replace(config, text=dataclasses.replace(text, num_layers=1))


def test_experts_in_either_tower():
    config = dataclasses.replace(
        TOWERS, moe=EXPERTS, block_pattern=("moe",), text=TextSizes(block_pattern=("dense", "moe"))
    )
    aux = run(config, make_batch()).aux
    assert "moe" in aux["image"]["segment_0"]["block_0"]
    assert "moe" in aux["text"]["segment_0"]["block_1"]
    assert "moe" not in aux["text"]["segment_0"]["block_0"]


def test_rows_that_fill_up_a_batch_take_no_part():
    """Experts that choose among all tokens of the batch do not see them."""
    moe = dataclasses.replace(EXPERTS, router=RouterConfig("expert_choice"), capacity="none")
    config = dataclasses.replace(ONE_TOWER, moe=moe)
    batch = make_batch(4)
    two = run(config, {name: value[:2] for name, value in batch.items()})
    filled = run(config, {**batch, "weights": np.asarray([1, 1, 0, 0], np.float32)})
    np.testing.assert_allclose(filled.image[:2], two.image, atol=1e-5)
    np.testing.assert_allclose(filled.text[:2], two.text, atol=1e-5)
    assert np.abs(run(config, batch).image[:2] - two.image).max() > 1e-3


def test_scale_and_bias():
    begin = dataclasses.replace(TOWERS, initial_scale=10.0, learn_bias=True, initial_bias=-10.0)
    model = build_two_towers(begin)
    params = meta.unbox(model.init(jax.random.key(0), make_batch()))["params"]
    outputs = run(begin, make_batch(), params)
    assert outputs.scale == pytest.approx(10) and outputs.bias == -10
    assert "bias" not in made(TOWERS)[0]["head"]
    wide = {**params["head"], "log_scale": jnp.float32(9)}
    assert run(begin, make_batch(), {**params, "head": wide}).scale == pytest.approx(100)


def test_mistakes():
    with pytest.raises(UserError, match="model.positions: 'rope'"):
        dataclasses.replace(ONE_TOWER, positions="rope")
    with pytest.raises(UserError, match="model.moe.router.name: 'soft' mixes pictures into their"):
        soft = dataclasses.replace(EXPERTS, router=RouterConfig("soft"), capacity="none")
        build_limoe(dataclasses.replace(ONE_TOWER, moe=soft))
    with pytest.raises(UserError, match="model.modalities: are 'image' and 'text'"):
        dataclasses.replace(ONE_TOWER, modalities=("image",))
    with pytest.raises(UserError, match="model.text.num_heads: 3 does not divide model.text.d_"):
        dataclasses.replace(TOWERS, text=TextSizes(num_heads=3))
    with pytest.raises(UserError, match="model.untie: a tower has one modality"):
        dataclasses.replace(TOWERS, untie=UntieConfig(qkv=True))
    with pytest.raises(UserError, match="objective.augment.mixup: a mixed picture has no text"):
        ContrastiveConfig(augment=AugmentConfig(mixup=0.2))
    with pytest.raises(UserError, match="model.max_scale: "):
        dataclasses.replace(TOWERS, initial_scale=200.0)
    with pytest.raises(UserError, match="model.initial_bias: needs model.learn_bias=True"):
        dataclasses.replace(TOWERS, initial_bias=-10.0)
    with pytest.raises(UserError, match="model.text_length=5: the texts are of 7 tokens"):
        made(dataclasses.replace(TOWERS, text_length=5))
