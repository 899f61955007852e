"""FLOPs from the config against FLOPs counted from the program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from moejax.analysis.experts import ffn_choices
from moejax.analysis.flops import (
    TokenFlops,
    adapter_products,
    counted_flops,
    flops_by_modality,
    flops_per_token,
    token_flops,
)
from moejax.analysis.jaxpr_flops import count_flops
from moejax.cli.list import config_args
from moejax.config import load_config
from moejax.config.load import short_names
from moejax.nn.block import BLOCKS, dense_block
from moejax.nn.patch_adapter import patch_adapter

SMALL = {"data.batch_size": 2, "data.sequence_length": 64}
MOE = {
    "model.block_pattern": ("moe:6", "untied"),
    "model.moe.num_experts": 4,
    "model.moe.top_k": 2,
    "model.moe.hidden": 40,
    "model.moe.shared_hidden": 24,
}
SMALL_VIT = {
    "model.num_layers": 4,
    "model.block_pattern": ("dense", "moe"),
    "model.moe.num_experts": 6,
    "model.moe.hidden": 40,
}
# What runs on a laptop, without :small, which is the default of its config; arguments are slow.
LAPTOP_CONFIGS = [
    pytest.param(f"{name}:{arg}", marks=[pytest.mark.slow] if arg else [])
    for name in short_names()
    for arg in config_args(name)
    if arg != "small" and load_config(f"{name}:{arg}").model.dtype == "float32"
]
UNTIED = {f"model.untie.{name}": True for name in ("qkv", "out", "ffn", "norms", "final_norm")}


def test_formula_by_hand():
    config = load_config(
        "chameleon",
        {
            "model.d_model": 8,
            "model.num_layers": 3,
            "model.num_heads": 4,
            "model.num_kv_heads": 2,
            "model.head_size": 6,
            "model.ffn_hidden": (10,),
            "model.vocab_size": 50,
            "data.sequence_length": 7,
        },
    )
    # Per layer: queries 24, keys and values 12 each, output back to 8; three matrices of SwiGLU.
    weights = 8 * (24 + 12 + 12) + 24 * 8 + 3 * 8 * 10
    expected = TokenFlops(3 * 2.0 * weights, 3 * 2.0 * 2 * 7 * 24, 2.0 * 8 * 50)
    assert token_flops(config) == expected
    assert flops_per_token(config) == expected.forward
    assert expected.training == 3 * expected.forward
    assert expected.forward - expected.causal == expected.attention / 2


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        UNTIED,
        {"model.num_kv_heads": 1, "model.block_pattern": ("untied", "dense"), **UNTIED},
        {"model.unroll": True, "model.tie_embeddings": True},
    ],
    ids=["dense", "mot", "mixed", "unrolled"],
)
def test_program_does_what_the_formula_says(overrides):
    config = load_config("chameleon", {**SMALL, **overrides})
    formula, counted = token_flops(config), counted_flops(config)
    assert formula is not None
    assert counted.forward.nominal == pytest.approx(formula.forward, rel=1e-9)
    assert counted.training.nominal == pytest.approx(formula.training, rel=1e-9)


def test_experts_cost_what_the_formula_says():
    """The formula leaves out the sums over tokens that statistics of the routing are made of."""
    config = load_config("chameleon", {**SMALL, **MOE})
    formula, counted = token_flops(config), counted_flops(config)
    assert formula is not None
    for value, program in (
        (formula.forward, counted.forward),
        (formula.training, counted.training),
    ):
        assert value < program.nominal < value * 1.0001
    more = token_flops(load_config("chameleon", {**SMALL, **MOE, "model.moe.top_k": 3}))
    assert more is not None
    # One more expert of three matrices, in half of the layers.
    layers = config.model.num_layers // 2
    expert = 2 * 3 * config.model.d_model * config.model.moe.hidden
    assert more.forward - formula.forward == pytest.approx(layers * expert, rel=1e-9)


@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_formula_of_a_patch_adapter_is_its_program(adapter):
    """One row that is a picture alone: all of its tokens are patches."""
    model = load_config(
        "transfusion",
        {"model.latents.adapter": adapter, "model.latents.patch": 2, "model.d_model": 24},
    ).model
    patches, z = model.latents.tokens_per_image, model.latents.size
    module = patch_adapter(model, name="adapter")

    inputs = (
        jax.ShapeDtypeStruct((1, patches, z), jnp.float32),
        jax.ShapeDtypeStruct((1, patches), jnp.float32),
        jax.ShapeDtypeStruct((1, patches), jnp.int32),
    )
    run = nn.init(both_ways_of, module)
    params = jax.eval_shape(run, jax.random.key(0), *inputs)
    apply = nn.apply(both_ways_of, module)
    counted = count_flops(apply, meta.unbox(params), *inputs)
    products = adapter_products(model, patches)
    assert counted.nominal == pytest.approx(2 * products * patches, rel=1e-9)


def both_ways_of(module, latents, times, image_id):
    patches_btd, memory = module.encode(latents, times, image_id)
    return module.decode(patches_btd, memory)


@pytest.mark.parametrize("spec", LAPTOP_CONFIGS)
def test_formula_and_count_agree_on_every_laptop_config(spec):
    config = load_config(spec)
    formula, counted = token_flops(config), counted_flops(config)
    assert formula is not None
    assert counted.forward.nominal == pytest.approx(formula.forward, rel=0.01)
    assert counted.training.nominal == pytest.approx(formula.training, rel=0.01)


@pytest.mark.parametrize("head", ["class_token", "map", "mean"])
@pytest.mark.parametrize("experts", ["dense", "top_k", "soft"])
def test_formula_of_a_vision_transformer_is_its_program(head, experts):
    """The statistics of the routing, which the formula leaves out, are a few multiply-adds."""
    moe = {} if experts == "dense" else {**MOE, "model.moe.router.name": experts}
    config = load_config(
        "vit",
        {
            "model.image_size": 8,
            "model.patch_size": 2,
            "model.head": head,
            "model.registers": 3,
            "model.positions": "rope",
            "model.num_kv_heads": 1,
            "model.ffn_activation": "gelu",
            "model.num_classes": 30,
            "model.num_heads": 4,
            "data.batch_size": 2,
            "data.image_size": 8,
            **moe,
            "model.block_pattern": ("dense",) if experts == "dense" else ("dense", "moe:6"),
        },
    )
    formula, counted = token_flops(config), counted_flops(config)
    assert formula is not None
    assert formula.forward <= counted.forward.nominal < formula.forward * 1.002


TOLD_A_TEXT = {"model.text_length": 6, "data.format": "pairs", "data.sequence_length": 6}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.block_pattern": ("mod:0.5:dense",)},
        {
            "model.block_pattern": ("recursive:dense",),
            "model.recursion.steps": 3,
            "model.recursion.router": "expert",
            "model.recursion.share_kv": True,
            "model.depth.causal_rule": "none",
        },
        TOLD_A_TEXT,
        {**TOLD_A_TEXT, "model.words.attend": True, "model.text.d_model": 16},
        {
            **TOLD_A_TEXT,
            "model.words.attend": True,
            "model.words.num_experts": 3,
            "model.words.hidden": 12,
            "model.words.outside": False,
        },
    ],
    ids=["dense", "mod", "recursive", "texts", "words", "places"],
)
def test_formula_of_a_diffusion_transformer_is_its_program(overrides):
    """What a row is told is multiplied once for the row, not for each of its tokens."""
    small = {"model.image_size": 8, "data.image_size": 8, "model.d_model": 32, "data.batch_size": 2}
    config = load_config("dit", {**small, "model.patch_size": 2, **overrides})
    formula, counted = token_flops(config), counted_flops(config)
    assert formula is not None
    assert counted.forward.nominal == pytest.approx(formula.forward, rel=1e-9)


def test_soft_routing_costs_its_slots():
    fields = {**SMALL_VIT, "model.moe.router.name": "soft"}
    one, two = (
        token_flops(load_config("vit", {**fields, "model.moe.router.options.slots": slots}))
        for slots in (1, 2)
    )
    model = load_config("vit", fields).model
    # Six more slots in each of two layers: scores, mixing in and out for each patch, and
    # an expert of three matrices for each picture.
    slots = 2 * 6
    mixing = 3 * 2 * model.num_patches * model.d_model
    expert = 2 * 3 * model.d_model * model.moe.hidden
    assert two.forward - one.forward == pytest.approx(slots * (mixing + expert), rel=1e-9)


def test_slots_are_shared_by_the_pictures_that_there_are():
    """A group of eight pictures in a batch of one is that picture."""
    fields = {**SMALL_VIT, "model.moe.router.name": "soft", "data.batch_size": 1}
    one, eight = (
        token_flops(load_config("vit", {**fields, "model.moe.routing_group": group})).forward
        for group in (1, 8)
    )
    assert one == eight


def test_formulas_of_the_papers_at_their_sizes():
    """What the papers say of the FLOPs and the active parameters of their own models."""
    forward = lambda spec: token_flops(load_config(spec)).forward
    assert forward("mot:7b") == forward("chameleon:7b")
    # Four experts of each modality, each on a quarter of its tokens; the widths are rounded.
    assert forward("moma:1.4b") == pytest.approx(forward("chameleon:1.5b"), rel=0.02)
    for size in ("0.6b", "1b", "2b", "7b"):
        moe = load_config(f"moe_plus_plus:{size}").model.moe
        tau, weightless = moe.capacity_tau, moe.weightless
        share = tau * moe.num_experts / (tau * moe.num_experts + weightless)
        assert ffn_choices(moe) == pytest.approx(share * moe.top_k)
    deepseek = load_config("deepseek_moe:16b")
    assert deepseek.about.total_params == pytest.approx(16.4e9, rel=0.01)
    assert deepseek.about.active_params == pytest.approx(2.8e9, rel=0.02)
    # Two FLOPs for each of them but the embedding table, and attention.
    embedding = deepseek.model.vocab_size * deepseek.model.d_model
    flops = token_flops(deepseek)
    expected = 2 * (deepseek.about.active_params - embedding)
    assert flops.weights + flops.logits == pytest.approx(expected, rel=1e-3)


def test_mot_costs_what_dense_does():
    """Of 2,048 tokens: the same nominal FLOPs, and within 3% with the worst case of padding."""
    sizes = {"data.batch_size": 8, "data.sequence_length": 256}
    mot = counted_flops(load_config("mot", sizes))
    dense = counted_flops(load_config("chameleon", sizes))
    assert mot.training.nominal == pytest.approx(dense.training.nominal, rel=1e-9)
    assert dense.training.visited == dense.training.nominal
    assert mot.training.visited <= 1.03 * dense.training.visited


def test_remat_counts_the_second_forward():
    plain = counted_flops(load_config("mot", SMALL))
    remat = counted_flops(load_config("mot", {**SMALL, "model.remat": "full"}))
    assert remat.forward.nominal == plain.forward.nominal
    formula = token_flops(load_config("mot", SMALL))
    # All that a block multiplies but its last product, whose output the backward does not need.
    again = remat.training.nominal - plain.training.nominal
    assert 0.5 * (formula.weights + formula.attention) < again
    assert again <= formula.weights + formula.attention


def test_towers_of_unequal_width():
    config = load_config("mot", {**SMALL, "model.ffn_hidden": (256, 512)})
    text, image = flops_by_modality(config).values()
    layers, d = config.model.num_layers, config.model.d_model
    assert image.forward - text.forward == layers * 2 * 3 * d * 256
    # The program does not know how many tokens are of which modality; the formula takes halves.
    counted, formula = counted_flops(config), token_flops(config)
    assert counted.training.nominal == pytest.approx(formula.training, rel=1e-9)


def test_towers_of_their_own_sizes_and_their_bridges():
    """By hand: a narrow tower has smaller weights, but the heads of all; maps in shared layers."""
    config = load_config("hbridge", SMALL)
    text, image = flops_by_modality(config).values()
    layers, d, h, length = 4, 96, 32, 64
    projections = d * 9 * h + 3 * h * d
    # Queries, keys, values and what comes back: between 3 and 4 heads, in two layers.
    bridges = 2 * 4 * (3 * h) * (4 * h)
    # Two maps of latents of 8 numbers, and that of the time.
    adapter = (2 * 8 + 128) * d
    expected = layers * (projections + 3 * d * 384) + bridges + adapter
    assert image.weights == 2.0 * expected
    assert image.attention == text.attention == layers * 4.0 * length * 4 * h
    counted, formula = counted_flops(config), token_flops(config)
    assert counted.forward.nominal == pytest.approx(formula.forward, rel=1e-9)


def test_a_block_without_a_formula_is_counted_all_the_same(monkeypatch):
    monkeypatch.setitem(BLOCKS._entries, "no_formula", dense_block)
    config = load_config("chameleon", {**SMALL, "model.block_pattern": ("no_formula",)})
    assert token_flops(config) is None
    assert flops_per_token(config) == 0
    plain = counted_flops(load_config("chameleon", SMALL))
    assert counted_flops(config).training == plain.training


def test_pictures_count_per_picture():
    config = load_config("tokenizer_fsq", {"data.batch_size": 2})
    one = counted_flops(config).training
    more = counted_flops(load_config("tokenizer_fsq", {"data.batch_size": 4})).training
    assert one.nominal == pytest.approx(more.nominal)
    assert one.nominal > 0
