"""What makes the ``hbridge`` config HBridge: unequal towers that meet in some layers only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis.params import boxed_params
from moejax.config import load_config
from moejax.config.towers import TowersConfig
from moejax.data.vocabulary import BOI, BOS, EOI, PATCH, Vocabulary
from moejax.errors import UserError
from moejax.generate.denoise import predict
from moejax.generate.generate import decode, pad_prompts, place_latents, prefill
from moejax.models.decoder import build_decoder
from moejax.nn.stack import Segment, segments_of
from moejax.surgery import init_from
from moejax.train.leaves import modality_axis, named_leaves, shape_of, towers_of

from .latent_rows import (
    AFTER_DRAWN,
    DRAWN,
    OPENING,
    PATCHES,
    SIZE,
    TEXT,
    TinyPictures,
    make_batch,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

NARROW, WIDE = 8, 16
UNEQUAL = {
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_size": 4,
    "model.towers.widths": (WIDE, NARROW),
    "model.towers.heads": (4, 2),
    "model.ffn_hidden": (24, 12),
}
EQUAL = {
    **UNEQUAL,
    "model.towers.widths": (WIDE, WIDE),
    "model.towers.heads": (4, 4),
    "model.ffn_hidden": (24,),
}
APART, TOGETHER = (False,) * 3, (True,) * 3
H = UNEQUAL["model.head_size"]


@functools.cache
def tiny(share: tuple[bool, ...], equal: bool = False) -> TinyPictures:
    sizes = EQUAL if equal else UNEQUAL
    layers = {"model.num_layers": len(share), "model.share_attention": share}
    return TinyPictures("hbridge", {**sizes, **layers})


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params: dict, batch: dict):
    return model.apply({"params": params}, batch)


def one_tower(params: dict, index: int, layers: int) -> dict:
    """The parameters of a tower as a model of its own has them: in one segment, without bridges."""
    name = ("text", "image")[index]

    def take(node: dict) -> dict:
        found = {}
        for key, value in node.items():
            if isinstance(value, dict):
                found[key] = take(value)
            elif key.endswith(f"_{name}") and not key.startswith("bridge"):
                found[key.removesuffix(f"_{name}")] = value
            elif not key.endswith(("_text", "_image")):
                # Scales of QK-norm, which has heads of one size: [l, m, h].
                found[key] = value[:, index : index + 1] if key == "scale_md" else value
        return found

    own = take(params)
    segments = [own["stack"][f"segment_{i}"] for i in range(len(own["stack"]))]
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *segments)
    assert len(jax.tree.leaves(stacked)[0]) == layers
    return {**own, "stack": {"segment_0": stacked}}


def test_with_nothing_shared_it_is_two_models():
    """Each as wide as its tower, in which the tokens of the other are padding."""
    both, batch = tiny(APART), make_batch()
    out = both.outputs(both.params, batch)
    model = both.config.model
    for index, (name, width, heads) in enumerate((("text", WIDE, 4), ("image", NARROW, 2))):
        alone = dataclasses.replace(
            model,
            d_model=width,
            num_heads=heads,
            num_kv_heads=heads // 2,
            ffn_hidden=model.ffn_hidden[index : index + 1],
            untie=type(model.untie)(),
            towers=TowersConfig(),
            share_attention=(),
        )
        params = one_tower(both.params, index, 3)
        if index:
            # What belongs to the text is of no use to it; sizes are all that counts.
            params["embedding_vd"] = params["embedding_vd"][:, :width]
            params["head_dv"] = params["head_dv"][:width]
        else:
            adapter = jax.tree.map(lambda leaf: leaf.repeat(2, axis=-1), params["patch_adapter"])
            adapter["out_dz"] = jnp.zeros((width, SIZE))
            params["patch_adapter"] = adapter
        here = (batch["modality"] == index) & (batch["segments"] > 0)
        own = {**batch, "segments": np.where(here, batch["segments"], 0)}
        found = apply(build_decoder(alone), params, own)
        if index:
            expected, got = found.denoised, out.denoised
        else:
            expected, got = found.logits, out.logits
        np.testing.assert_allclose(got[here], expected[here], atol=1e-5, err_msg=name)
        assert np.abs(np.asarray(got[here])).max() > 0.1


def test_with_all_shared_and_equal_widths_it_is_a_mixture_of_transformers():
    """Bridges begin as the identity, with which towers of their own sizes are MoT's."""
    both, batch = tiny(TOGETHER, equal=True), make_batch()
    mot = dataclasses.replace(both.config.model, towers=TowersConfig(), share_attention=())
    params = jax.tree.map(lambda leaf: leaf, both.params)
    attention = params["stack"]["segment_0"]["block_0"]["attention"]
    bridges = [name for name in attention if name.startswith("bridge")]
    assert len(bridges) == 4
    drawn = jax.jit(both.model.init)(jax.random.key(0), batch)["params"]
    drawn = drawn["stack"]["segment_0"]["block_0"]["attention"]
    learned = {name: attention[name] for name in bridges}
    for name in bridges:
        attention[name] = drawn[name].unbox()
    got = both.outputs(params, batch)

    def stacked(node: dict) -> dict:
        found = {k: stacked(v) if isinstance(v, dict) else v for k, v in node.items()}
        for key in [key for key in found if key.endswith("_text")]:
            pair = [found.pop(key), found.pop(key.replace("_text", "_image"))]
            # Of [l, 1, ...] or, for the final norm, [1, d].
            axis = 1 if pair[0].ndim > 2 else 0
            found[key.removesuffix("_text")] = jnp.concatenate(pair, axis=axis)
        return {k: v for k, v in found.items() if not k.startswith("bridge")}

    expected = apply(build_decoder(mot), stacked(params), batch)
    text, picture = (batch["segments"] > 0) & (batch["modality"] == 0), batch["modality"] == 1
    np.testing.assert_allclose(got.logits[text], expected.logits[text], atol=1e-5)
    np.testing.assert_allclose(got.denoised[picture], expected.denoised[picture], atol=1e-5)
    # Other maps change what the towers see of each other.
    attention.update(learned)
    assert np.abs(both.outputs(params, batch).logits - got.logits).max() > 1e-2


def of_tower(gradients: dict, name: str) -> float:
    """The largest number in the gradient of what is a tower's own."""
    found = [0.0]
    for path, leaf in gradients.items():
        if path.endswith(f"_{name}"):
            found.append(np.abs(leaf).max())
        elif path.endswith("_norm/scale_md"):
            found.append(np.abs(leaf[:, ("text", "image").index(name)]).max())
        elif path.startswith("patch_adapter") and name == "image":
            found.append(np.abs(leaf).max())
    return max(found)


def test_towers_meet_in_the_middle_alone():
    """Gradients to the other tower are zero where nothing is shared, and of its last layers."""
    batch = make_batch()
    # Padding, which looks at all that there is, has no part in it.
    text, picture = {"text": TEXT}, {"pictures": (*DRAWN, *OPENING)}
    apart = tiny(APART)
    for of, own, other in ((text, "text", "image"), (picture, "image", "text")):
        gradients = apart.gradient(batch, **of)
        assert of_tower(gradients, other) == 0 and of_tower(gradients, own) > 1e-3
    middle = tiny((False, True, False))
    for of, other in ((text, "image"), (picture, "text")):
        gradients = middle.gradient(batch, **of)
        before, shared, after = (
            of_tower({path: leaf for path, leaf in gradients.items() if part in path}, other)
            for part in ("segment_0", "segment_1", "segment_2")
        )
        # Through the keys of the shared layer, and nothing after it.
        assert before > 1e-4 and shared > 1e-4 and after == 0
    names = middle.params["stack"]["segment_1"]["block_0"]["attention"]
    assert names["bridge_q_mfnh_image"].shape == (1, 1, 2 * H, 4, H)
    assert names["bridge_k_mfnh_image"].shape == (1, 1, H, 2, H)
    alone = apart.params["stack"]["segment_0"]["block_0"]["attention"]
    assert not any(name.startswith("bridge") for name in alone)


def test_earlier_tokens_do_not_see_later_ones():
    both, batch = tiny((False, True, False)), make_batch()
    before = both.outputs(both.params, batch)
    changed = {**batch, "latents": batch["latents"].copy(), "tokens": batch["tokens"].copy()}
    changed["latents"][:, DRAWN] += 1
    after = both.outputs(both.params, changed)
    first, end = DRAWN[0], DRAWN[-1] + 1
    np.testing.assert_array_equal(before.logits[:, :first], after.logits[:, :first])
    assert np.abs(before.logits - after.logits)[:, AFTER_DRAWN].max() > 1e-3
    changed["tokens"][:, end + 1] = 30
    later = both.outputs(both.params, changed)
    np.testing.assert_array_equal(later.denoised[:, :end], after.denoised[:, :end])
    assert np.abs(later.logits - after.logits)[:, end + 1].max() > 1e-3
    np.testing.assert_array_equal(later.logits[:, 11:-1], before.logits[:, 11:-1])


@pytest.mark.parametrize(
    "share",
    [
        (False, True, False),
        pytest.param((False, True), marks=pytest.mark.slow),
        pytest.param((True, False), marks=pytest.mark.slow),
        pytest.param(APART, marks=pytest.mark.slow),
        pytest.param(TOGETHER, marks=pytest.mark.slow),
    ],
)
def test_prefill_and_decoding_are_the_full_forward(share):
    both = tiny(share)
    vocabulary = Vocabulary(text_size=20, image_codes=0, codes_per_image=PATCHES)
    picture = [BOI, *[PATCH] * PATCHES, EOI]
    rows = [[BOS, 20, *picture, 21, 22, BOI], [BOS, *picture, 23, BOI]]
    rng = np.random.default_rng(4)
    clean = list(rng.normal(size=(2, PATCHES, SIZE)).astype(np.float32))
    noisy = rng.normal(size=(2, PATCHES, SIZE)).astype(np.float32)
    whole = [[*row, *[PATCH] * PATCHES] for row in rows]
    tokens, lengths = pad_prompts(whole)
    index = np.arange(tokens.shape[1])
    image_id = np.where(tokens == PATCH, np.cumsum(tokens == BOI, axis=1), 0)
    latents = [np.concatenate(pair) for pair in zip(clean, noisy, strict=True)]
    full = {
        "tokens": tokens,
        "modality": (tokens == PATCH).astype(np.int32),
        "segments": (index < lengths[:, None]).astype(np.int32),
        "positions": np.tile(index, (2, 1)).astype(np.int32),
        "image_id": image_id.astype(np.int32),
        "latents": place_latents(tokens, latents, SIZE),
        "times": np.where(image_id == 2, 0.6, 0).astype(np.float32),
    }
    expected = both.outputs(both.params, full)

    # All but the last two tokens at once, those one by one, then the patches beside the cache.
    tokens, lengths = pad_prompts([row[:-2] for row in rows])
    placed = place_latents(tokens, clean, SIZE)
    logits, cache = jax.jit(prefill, static_argnums=(0, 2, 5))(
        both.model, both.params, vocabulary, tokens, lengths, 32, placed
    )
    step = jax.jit(decode, static_argnums=(0, 2))
    for back in (2, 1, 0):
        at = np.asarray([len(row) - 1 - back for row in rows])
        np.testing.assert_allclose(logits, expected.logits[np.arange(2), at], atol=1e-4)
        if back:
            token_b = jnp.asarray([row[-back] for row in rows])
            logits, cache = step(
                both.model, both.params, vocabulary, cache, token_b, jnp.ones(2, bool)
            )
    draw = jax.jit(predict, static_argnums=0)
    found = draw(both.model, both.params, cache, jnp.asarray(noisy), jnp.asarray(0.6))
    for i, row in enumerate(rows):
        here = slice(len(row), len(row) + PATCHES)
        np.testing.assert_allclose(found[i], expected.denoised[i, here], atol=1e-4)


def test_a_text_model_becomes_the_tower_of_text():
    """``train.init_from`` of ``hbridge:text``, whose layers lie in one segment."""
    config, text = load_config("hbridge"), load_config("hbridge:text")
    there = {
        name: shape_of(leaf)
        for name, leaf in named_leaves(boxed_params(build_decoder(text.model), text)).items()
    }
    modalities = config.model.modalities
    here = {
        name: init_from.Leaf(shape_of(leaf), modality_axis(leaf), towers_of(name, leaf, modalities))
        for name, leaf in named_leaves(boxed_params(build_decoder(config.model), config)).items()
    }
    source = init_from.Source("text", there, text.model.modalities)
    rules = init_from.Rules(config.train.init_rename)
    plan = init_from.plan(here, source, rules, modalities)
    assert plan.values == text.about.total_params
    assert not plan.unused
    assert all("image" in name or "patch_adapter" in name for name in plan.skipped)


def test_layers_of_one_kind_are_one_scan():
    model = load_config("hbridge:7b").model
    kinds = ("untied",)
    said = dataclasses.replace(model, share_attention=(True,) * 28)
    assert segments_of(said) == segments_of(dataclasses.replace(model, share_attention=()))
    assert segments_of(model) == (
        Segment(kinds, 6, 0, separate=True),
        Segment(kinds, 16, 6),
        Segment(kinds, 6, 22, separate=True),
    )
    assert [tower.bridged for tower in model.tower_shapes] == [False, True]
    assert [tower.kv_heads for tower in model.tower_shapes] == [4, 3]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model.share_attention": (True,)}, "model.share_attention: give True or False for each"),
        ({"model.towers.widths": (WIDE,)}, "model.towers.widths: give a positive number for each"),
        ({"model.towers.widths": (8, 8)}, "model.towers.widths: the widest of"),
        ({"model.towers.heads": (2, 4)}, "model.towers.heads: the widest tower has the most"),
        ({"model.towers.heads": (4, 1)}, "model.towers.heads: .* leave no whole number"),
        ({"model.untie.qkv": False}, "model.towers.widths: .* set all of model.untie"),
        ({"model.block_pattern": ("dense",)}, "model.towers.widths: need blocks of kind 'untied'"),
        ({"model.towers.widths": ()}, "model.towers.heads: needs model.towers.widths"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    sizes = {**UNEQUAL, "model.d_model": WIDE, "model.share_attention": APART}
    with pytest.raises(UserError, match=message):
        load_config("hbridge", {**sizes, **overrides})
