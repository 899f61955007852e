"""Five optimizer steps of published models on eight devices are those of one, whatever the mesh."""

import functools

import jax
import numpy as np
import pytest

from moejax.config import load_config
from moejax.parallel.mesh import batch_sharding
from moejax.train.setup import prepare_model

STEPS = 5
NARROW = {
    "model.dtype": "float64",
    "model.vocab_size": 64,
    "model.d_model": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 0,
    "model.num_layers": 2,
    "model.ffn_hidden": (32,),
    "data.batch_size": 8,
    "data.sequence_length": 12,
    "optim.learning_rate": 1e-3,
}
# 16 patches a picture; eight pictures are routed together, with noise and places.
VISION = {
    "model.dtype": "float64",
    "model.image_size": 8,
    "model.patch_size": 2,
    "model.d_model": 32,
    "model.num_heads": 4,
    "model.num_layers": 2,
    "model.ffn_hidden": (32,),
    "model.last_blocks": ("moe",),
    "data.image_size": 8,
    "data.batch_size": 8,
    "optim.learning_rate": 1e-3,
}
# Texts of 8 words beside them; the batch is routed together, so that all rows compete.
PAIRS = {name: value for name, value in VISION.items() if name != "model.last_blocks"} | {
    "model.vocab_size": 64,
    "model.text_length": 8,
    "data.sequence_length": 8,
}
EXPERTS = {"model.moe.num_experts": 8, "model.moe.hidden": 16}
CHOICE = {"model.moe.allowed": ((0, 1, 2, 3), (4, 5, 6, 7)), "model.moe.hidden": 16}
MODELS = {
    "mot": ("mot", {}),
    "transfusion": ("quickstart:transfusion", {"model.latents.adapter": "linear"}),
    # Pictures that open their row are read by the tower of text.
    "bagel": ("bagel", {"objective.max_time_image_first": 0.0}),
    "hbridge": (
        "hbridge",
        {
            "model.share_attention": (True, False),
            "model.towers.widths": (32, 16),
            "model.towers.heads": (4, 2),
            "model.head_size": 8,
            "model.ffn_hidden": (32, 16),
            "objective.text_weight": 1.0,
            "optim.freeze": (),
        },
    ),
    "moma": ("moma:4t4i", CHOICE),
    # Its bias is moved by the counts of the whole batch.
    "deepseek_v3": ("deepseek_v3", {**EXPERTS, "model.moe.shared_hidden": 16}),
    "expert_choice": ("expert_choice", EXPERTS),
    "vmoe": ("vmoe", VISION),
    "dit_moe": ("dit_moe", {**VISION, "model.moe.shared_hidden": 16}),
    # Its loss is made of sums over the tokens, and of the prototypes that they chose.
    "promoe": (
        "promoe",
        {
            **VISION,
            **EXPERTS,
            "model.moe.allowed": (tuple(range(7)), (7,)),
            "model.moe.shared_hidden": 16,
        },
    ),
    # Its thresholds are moved by what the whole batch was given.
    "diffmoe": ("diffmoe", {**VISION, **EXPERTS}),
    # Experts by time, and the places of words.
    "raphael": (
        "raphael:text",
        {**PAIRS, **EXPERTS, "model.words.hidden": 16, "model.words.num_experts": 3},
    ),
    "clip": ("clip", {**PAIRS, "objective.chunk": 3}),
    "siglip": ("siglip", PAIRS),
    "limoe": ("limoe", PAIRS),
}
MESHES = {
    "data": {"data": 8},
    "fsdp x expert": {"data": 1, "fsdp": 2, "expert": 4},
    "data x expert x tensor": {"data": 2, "expert": 2, "tensor": 2},
    "expert": {"data": 1, "expert": 8},
    "data x sequence": {"data": 4, "sequence": 2},
}


def batch_of(config, step):
    """Rows whose devices differ in how much of each modality they hold, some of it padding."""
    rng = np.random.default_rng(step)
    if config.data.format == "images":
        return pictures_of(config, rng)
    if config.data.format == "pairs":
        return pairs_of(config, rng)
    rows, length = config.data.batch_size, config.data.sequence_length
    share = np.linspace(0, 0.9, rows)[:, None]
    modality = (rng.random((rows, length)) < share).astype(np.int32)
    ids = lambda: rng.integers(16, config.model.vocab_size, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[::3, -2:] = 0
    batch = {
        "tokens": ids(),
        "targets": ids(),
        "modality": modality,
        "segments": segments,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weights": (segments * (rng.random((rows, length)) < 0.8)).astype(np.float32),
    }
    if config.model.latents.channels:
        image_id = np.zeros((rows, length), np.int32)
        # In every other row the picture opens it, behind BOS and BOI.
        image_id[::2, 4:8] = image_id[1::2, 2:6] = 1
        latents = rng.standard_normal((rows, length, config.model.latents.size))
        batch |= {
            "image_id": image_id,
            "modality": (image_id > 0).astype(np.int32),
            "latents": latents.astype(np.float32),
        }
    return batch


def pictures_of(config, rng):
    """Pictures of two brightnesses; one row is filler."""
    rows, side = config.data.batch_size, config.data.image_size
    labels = rng.integers(0, config.model.num_classes, rows)
    images = rng.integers(0, 128, (rows, side, side, 3)) + 60 * (labels % 2)[:, None, None, None]
    return {
        "images": images.astype(np.uint8),
        "index": np.arange(rows, dtype=np.int32),
        "labels": labels.astype(np.int32),
        "mirror": np.zeros(rows, bool),
        "weights": (np.arange(rows) < rows - 1).astype(np.float32),
    }


def pairs_of(config, rng):
    """Pictures with texts, two of one family; one row is filler."""
    rows, length = config.data.batch_size, config.data.sequence_length
    tokens = rng.integers(16, config.model.vocab_size, (rows, length)).astype(np.int32)
    tokens[::2, 5:] = 0
    side = config.data.image_size
    return {
        "images": rng.integers(0, 256, (rows, side, side, 3)).astype(np.uint8),
        "mirror": np.zeros(rows, bool),
        "tokens": tokens,
        "family": (np.arange(rows, dtype=np.int32) + 1) // 2,
        "weights": (np.arange(rows) < rows - 1).astype(np.float32),
    }


def losses(model, mesh, devices):
    name, overrides = MODELS[model]
    mesh = {f"mesh.{axis}": size for axis, size in mesh.items()}
    with jax.enable_x64(True):
        narrow = {} if "model.image_size" in overrides else NARROW
        config = load_config(name, {**narrow, **overrides, **mesh})
        setup = prepare_model(config, devices)
        step = setup.train_step()
        values = []
        with jax.set_mesh(setup.mesh):
            state = setup.recipe.create()
            for i in range(STEPS):
                batch = jax.device_put(batch_of(config, i), batch_sharding(setup.mesh))
                state, metrics = step(state, batch)
                values.append(float(metrics.losses.total()))
    return values


@functools.cache
def losses_on_one_device(model):
    return losses(model, {"data": 1}, jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", MODELS)
def test_five_steps_on_eight_devices_are_those_of_one(model, mesh):
    expected = losses_on_one_device(model)
    assert len(set(expected)) == STEPS
    got = losses(model, MESHES[mesh], jax.devices())
    np.testing.assert_allclose(got, expected, rtol=1e-8)
