"""The "routing" evaluator on a vision transformer: classes, places, pictures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ImageColor

from moejax.analysis.heatmaps import NOTHING, expert_color
from moejax.analysis.routing import NONE, entropy
from moejax.analysis.routing_record import RoutingRecord
from moejax.config import load_config
from moejax.config.moe import MoEConfig, RouterConfig
from moejax.config.schema import Config, DataConfig, EvalConfig
from moejax.config.vision import ClassificationConfig, ViTConfig
from moejax.data.pair_pipeline import PairPipeline
from moejax.data.pipeline import ImagePipeline
from moejax.data.vocabulary import PAD
from moejax.errors import UserError
from moejax.train import routing
from moejax.train.evaluate import EvalContext, check_evaluators, eval_plans, run_evaluators
from moejax.train.routing_log import routing_layers
from moejax.train.routing_pictures import draw_classes, draw_patches, draw_places
from moejax.train.setup import prepare_model
from tests.models.small_vit import SMALL_FIELDS

pytestmark = pytest.mark.usefixtures("quick_compiles")
CLASSES, EXPERTS, PATCHES, EXTRA = 3, 4, 4, 3
MODEL = ViTConfig(
    image_size=8,
    patch_size=4,
    num_classes=CLASSES,
    d_model=16,
    num_heads=2,
    num_layers=2,
    ffn_hidden=(24,),
    head="class_token",
    registers=2,
    block_pattern=("dense", "moe"),
    moe=MoEConfig(num_experts=EXPERTS, top_k=2, hidden=8),
    kernel_backend="reference",
)


class Pictures(list):
    """Records of random pictures of three classes, some without a label."""

    name = "made:pictures"
    version = "1"
    categories = ("round", "long", "<flat>")
    split = "val"

    def __init__(self, labels):
        draw = np.random.default_rng(0)
        super().__init__(
            {"id": str(i), "label": label, "image": draw.integers(0, 256, (8, 8, 3), np.uint8)}
            for i, label in enumerate(labels)
        )


def make_config(**moe) -> Config:
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, **moe))
    return Config(
        model=model,
        data=DataConfig(format="images", image_size=8, batch_size=4),
        objective=ClassificationConfig(),
        eval=EvalConfig(metrics=("routing",)),
    )


def make_context(config, labels) -> EvalContext:
    setup = prepare_model(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        params = setup.recipe.create().params
    pipeline = ImagePipeline(config, Pictures(labels))
    return setup.eval_context(params, pipeline, pipeline)


def evaluated(config, labels):
    """(the result, its record, the context)."""
    context = make_context(config, labels)
    result = run_evaluators(context, eval_plans(config.eval))
    return result, RoutingRecord(**result.arrays["val/routing"]), context


def recorded(context) -> dict:
    """What the router of the layer of experts says of all pictures."""
    images = np.stack([record["image"] for record in context.pipeline.source])
    apply = jax.jit(functools.partial(context.model.apply, record=True))
    with jax.set_mesh(context.mesh):
        aux = jax.device_get(apply({"params": context.params}, {"images": images}).aux)
    return aux["segment_0"]["block_1"]["moe"]["router"]


def test_counts_by_class_and_place():
    """Against the recorded choices; a filler row and a picture without a label are left out."""
    labels = [0, 1, 2, 1, -1, 2, 0]
    config = make_config()
    result, record, context = evaluated(config, labels)
    by_class, by_patch = np.zeros((CLASSES, EXPERTS)), np.zeros((PATCHES, EXPERTS))
    pictures = [record["image"] for record in context.pipeline.source]
    apply = jax.jit(
        lambda batch: context.model.apply({"params": context.params}, batch, record=True)
    )
    with jax.set_mesh(context.mesh):
        aux = jax.device_get(apply({"images": np.stack(pictures)}).aux)
    ids = aux["segment_0"]["block_1"]["moe"]["router"]["expert_ids"][0]
    assert ids.shape == (7, EXTRA + PATCHES, 2)
    for row, label in enumerate(labels):
        for t, chosen in enumerate(ids[row]):
            if label >= 0:
                by_class[label, chosen] += 1
            if t >= EXTRA:
                by_patch[t - EXTRA, chosen] += 1
    assert record.by_class[0].tolist() == by_class.tolist()
    assert record.by_patch[0].tolist() == by_patch.tolist()
    assert record.classes.tolist() == list(Pictures.categories)
    assert record.tokens.tolist() == [7 * (EXTRA + PATCHES)]
    given = (entropy(by_class) * by_class.sum(axis=1)).sum() / by_class.sum()
    assert result.values["routing/class_entropy"] == pytest.approx(given)
    assert set(result.values) == set(routing.metric_names(config))
    names = ("experts", "together", "classes", "places", "patches")
    assert set(result.images) == {f"val/routing_{name}" for name in names}

    # What is shown: the four pictures of the first batch, their patches in their places.
    assert record.pictures.tolist() == np.stack(pictures[:4]).tolist()
    assert record.places.tolist() == [[row, EXTRA] for row in range(4)]
    assert record.grid.tolist() == [2, 2]
    assert (np.sort(record.row_experts[0], axis=-1) == np.sort(ids[:4], axis=-1)).all()
    shares = record.class_share()
    np.testing.assert_allclose(shares[0], by_class / by_class.sum(axis=1, keepdims=True))


class Pairs(Pictures):
    """The same with texts of different length."""

    def __init__(self, labels):
        super().__init__(labels)
        for number, record in enumerate(self):
            record["text"] = "ape" * (1 + number % 3)

    def text_at(self, index):
        return self[index]["text"]


TINY = {
    **SMALL_FIELDS,
    "model.patch_size": 4,
    "model.moe.num_experts": EXPERTS,
    "model.moe.hidden": 8,
    "model.moe.losses": (),
    "data.batch_size": 4,
    "eval.metrics": ("routing",),
}
PAIRS = {
    "model.registers": EXTRA,
    "model.vocab_size": 272,
    "model.text_length": 12,
    "model.moe.capacity": "none",
    "data.sequence_length": 12,
    "data.text_tokenizer": "bytes",
}


def evaluated_config(config, pipeline):
    """As :func:`evaluated`, of any pipeline."""
    setup = prepare_model(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        params = setup.recipe.create().params
    context = setup.eval_context(params, pipeline, pipeline)
    result = run_evaluators(context, eval_plans(config.eval))
    return result, RoutingRecord(**result.arrays["val/routing"]), context


def recorded_pairs(context):
    """(batch, aux) of each batch of pictures and texts."""
    apply = jax.jit(functools.partial(context.model.apply, record=True))
    for batch in context.pipeline.eval_batches(2):
        with jax.set_mesh(context.mesh):
            given = jax.tree.map(jnp.asarray, batch)
            yield batch, jax.device_get(apply({"params": context.params}, given).aux)


def test_words_count_beside_patches_and_their_padding_does_not():
    """LIMoE: a row is a picture, its registers first, and then a text; against what is recorded."""
    config = load_config("limoe", {**TINY, **PAIRS})
    labels = [0, 1, 2, 1, -1, 2, 0]
    result, record, context = evaluated_config(config, PairPipeline(config, Pairs(labels)))

    used, by_patch, dealt = np.zeros((2, EXPERTS)), np.zeros((PATCHES, EXPERTS)), 0
    by_class = np.zeros((CLASSES, EXPERTS))
    for batch, aux in recorded_pairs(context):
        ids = np.asarray(aux["segment_0"]["block_1"]["moe"]["router"]["expert_ids"][0])[..., 0]
        words = EXTRA + PATCHES
        for row in np.flatnonzero(batch["weights"]):
            np.add.at(used[0], ids[row, :words], 1)
            np.add.at(used[1], ids[row, words:][batch["tokens"][row] != PAD], 1)
            by_patch[np.arange(PATCHES), ids[row, EXTRA:words]] += 1
            if batch["labels"][row] >= 0:
                np.add.at(by_class[batch["labels"][row]], ids[row, :words], 1)
            dealt += 1
    assert dealt == len(labels)
    assert record.modalities.tolist() == ["image", "text"]
    assert record.chosen[0].tolist() == used.tolist()
    # As the model counts for its losses and logs.
    assert record.tokens.tolist() == used.sum(axis=1).tolist()
    assert record.by_patch[0].tolist() == by_patch.tolist()
    assert record.by_class[0].tolist() == by_class.tolist()
    assert record.places.tolist() == [[row, EXTRA] for row in range(4)]
    # Bytes of "ape" once, twice, three times and once, between two marks.
    assert record.row_valid[:, words:].sum(axis=1).tolist() == [5, 8, 11, 5]
    for name, counts in zip(("image", "text"), used, strict=True):
        expected = np.exp(entropy(counts))
        assert result.values[f"routing/{name}/experts_used"] == pytest.approx(expected)


def test_two_towers_have_patches_then_words_and_layers_one_after_the_other():
    """CLIP-MoE with two layers of pictures and one of texts, against what is recorded."""
    config = load_config("clip_moe", {**TINY, **PAIRS, "model.text.num_layers": 1})
    labels, top_k = [0, 1, 2, 1, -1, 2, 0], config.model.moe.top_k
    result, record, context = evaluated_config(config, PairPipeline(config, Pairs(labels)))

    used, by_class = np.zeros((3, 2, EXPERTS)), np.zeros((2, CLASSES, EXPERTS))
    of_tower = lambda aux, name: aux[name]["segment_0"]["block_0"]["moe"]["router"]["expert_ids"]
    for batch, aux in recorded_pairs(context):
        for row in np.flatnonzero(batch["weights"]):
            for layer in range(2):
                ids = of_tower(aux, "image")[layer, row]
                np.add.at(used[layer, 0], ids, 1)
                if batch["labels"][row] >= 0:
                    np.add.at(by_class[layer, batch["labels"][row]], ids, 1)
            np.add.at(used[2, 1], of_tower(aux, "text")[0, row][batch["tokens"][row] != PAD], 1)
    assert record.layers.tolist() == [0, 1, 2]
    assert record.modalities.tolist() == ["image", "text"]
    assert record.chosen.tolist() == used.tolist()
    patches, words = len(labels) * (EXTRA + PATCHES), 3 * (5 + 8 + 11) - 8 - 11
    assert record.tokens.tolist() == [patches, words]
    assert (used.sum(axis=-1) / top_k).tolist() == [[patches, 0], [patches, 0], [0, words]]
    assert set(result.values) == set(routing.metric_names(config))
    assert np.isfinite(list(result.values.values())).all()
    effective = np.exp(entropy(used))
    got = [result.values[f"routing/{name}/experts_used"] for name in ("image", "text")]
    assert got == pytest.approx([effective[:2, 0].mean(), effective[2, 1]])
    assert record.by_class[:2].tolist() == by_class.tolist() and not record.by_class[2].any()
    given = (entropy(by_class) * by_class.sum(axis=2)).sum(axis=1) / by_class.sum(axis=(1, 2))
    assert result.values["routing/class_entropy"] == pytest.approx(given.mean())
    # No layer is given the tokens of the other tower, and pictures are of the first two.
    assert (record.row_experts[:2, :, EXTRA + PATCHES :] == NONE).all()
    assert (record.row_experts[2, :, : EXTRA + PATCHES] == NONE).all()
    assert record.row_valid[:, EXTRA + PATCHES :].sum(axis=1).tolist() == [5, 8, 11, 5]
    assert record.picture_layers == [0, 1] and not record.by_patch[2].any()
    same = routing.routing_agreement(context, context.params, context.params)
    assert same["first"].tolist() == same["overlap"].tolist() == [1, 1, 1]


def test_layers_of_towers_are_numbered_by_their_depth():
    """Of every other layer with experts, and of texts behind those of pictures."""
    model = load_config("vision_routers:softmax_token_clip").model
    name = "{}/segment_{}/block_{}/moe/router".format
    found = routing_layers(model, {name("image", 0, 1): 2})
    assert [layer.layer for layer in found] == [1, 3]
    model = load_config("clip_moe").model
    found = routing_layers(model, {name("text", 0, 0): 2, name("image", 0, 0): 3})
    assert [(layer.layer, layer.name[:5]) for layer in found] == [
        *((number, "image") for number in range(3)),
        *((number, "text/") for number in (3, 4)),
    ]
    model = load_config("dit:text", {"model.block_pattern": ("dense", "moe")}).model
    found = routing_layers(model, {name("image", 0, 1): 2})
    assert [layer.layer for layer in found] == [1, 3]


def test_every_picture_is_asked_for_each_task():
    """Against the choices for each task by itself; first comes the one that turns pictures."""
    fields = {
        "model.modalities": ("rotation", "class", "group"),
        "model.task_classes": (4, CLASSES, 2),
        "model.num_classes": 4 + CLASSES + 2,
        "objective.groups": (0, 1, 1),
    }
    config = load_config("modular_vision", {**TINY, **fields})
    labels = [0, 1, 2, 1, -1, 2, 0]
    result, record, context = evaluated_config(config, ImagePipeline(config, Pictures(labels)))
    assert record.modalities.tolist() == ["rotation", "class", "group"]
    assert record.tokens.tolist() == [len(labels) * PATCHES] * 3

    upright = np.stack([picture["image"] for picture in context.pipeline.source])
    turned = np.stack([np.rot90(image, i) for i, image in enumerate(upright)])
    apply = jax.jit(functools.partial(context.model.apply, record=True))
    used, by_class = np.zeros((3, EXPERTS)), np.zeros((CLASSES, EXPERTS))
    for task in range(3):
        batch = {"images": upright if task else turned, "task": np.full(len(labels), task)}
        with jax.set_mesh(context.mesh):
            aux = jax.device_get(apply({"params": context.params}, batch).aux)
        ids = aux["segment_0"]["block_1"]["moe"]["router"]["expert_ids"][0]
        np.add.at(used[task], ids, 1)
        for label in range(CLASSES):
            np.add.at(by_class[label], ids[np.asarray(labels) == label], 1)
    assert record.chosen[0].tolist() == used.tolist()
    assert record.by_class[0].tolist() == by_class.tolist()
    assert record.pictures.tolist() == turned[:4].tolist()
    assert set(result.values) == set(routing.metric_names(config))
    for name, counts in zip(record.modalities, used, strict=True):
        expected = np.exp(entropy(counts))
        assert result.values[f"routing/{name}/experts_used"] == pytest.approx(expected)


def test_routing_by_place_alone_has_no_entropy_given_the_place():
    result, record, _ = evaluated(make_config(router=RouterConfig("hash"), top_k=1), [0, 1, 2, 0])
    assert result.values["routing/token_entropy"] == pytest.approx(0, abs=1e-9)
    assert result.values["routing/expert_entropy"] > 0.1
    assert ((record.by_patch > 0).sum(axis=-1) == 1).all()
    assert "val/routing_together" not in result.images


def test_an_expert_that_nobody_chooses_is_dead():
    config = make_config(top_k=1)
    context = make_context(config, [0, 1, 2, 0])
    router = lambda path: "router_mde" in jax.tree_util.keystr(path)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.at[..., 1:].set(leaf[..., :1]) if router(path) else leaf,
        context.params,
    )
    result = run_evaluators(context.with_params(params), eval_plans(config.eval))
    # Of equal logits the first expert is chosen.
    assert result.values["routing/dead_experts"] == EXPERTS - 1
    assert result.values["routing/image/experts_used"] == pytest.approx(1)
    record = RoutingRecord(**result.arrays["val/routing"])
    moved = dataclasses.replace(record, chosen=np.array([[[300, 300, 3.1, 2.9]]]))
    # An even share is 151.5, a hundredth of it 1.5.
    assert moved.dead().tolist() == [0]
    moved = dataclasses.replace(record, chosen=np.array([[[300, 300, 1.4, 0]]]))
    assert moved.dead().tolist() == [2]
    # Experts without weights are none of them.
    moved = dataclasses.replace(moved, num_ffn=np.array([3]))
    assert moved.dead().tolist() == [1]


def test_of_soft_routing_the_heaviest_expert_counts():
    config = make_config(router=RouterConfig("soft"))
    result, record, context = evaluated(config, [0, 1, 2, 0])
    heaviest = recorded(context)["logits"][0].argmax(axis=-1)
    assert record.row_experts[0, :, :, 0].tolist() == heaviest.tolist()
    assert record.by_patch.sum() == 4 * PATCHES
    assert np.isfinite(list(result.values.values())).all()


def test_records_from_before_have_no_classes(tmp_path):
    _, record, _ = evaluated(make_config(), [0, 1, 2, 0])
    arrays = record.arrays()
    older = {k: v for k, v in arrays.items() if not k.startswith(("class", "by_"))}
    np.savez(tmp_path / "older.npz", **older)
    read = RoutingRecord.read(tmp_path / "older.npz")
    assert not read.by_class.any() and not read.by_patch.any()
    np.savez(tmp_path / "broken.npz", **{k: v for k, v in older.items() if k != "chosen"})
    with pytest.raises(KeyError, match="chosen"):
        RoutingRecord.read(tmp_path / "broken.npz")
    # Other pictures are other rows, though their tokens have the same places.
    assert record.agreement(record).tolist() == [1]
    other = dataclasses.replace(record, pictures=record.pictures // 2)
    assert record.agreement(other) is None


def test_pictures_show_the_experts_of_patches():
    """Halfway between the picture and the colour of the expert, patch by patch."""
    _, record, _ = evaluated(make_config(top_k=1), [0, 1, 2, 0])
    ids = record.row_experts.copy()
    ids[0, 0, EXTRA:, 0] = [0, 1, NONE, 3]
    white = np.full_like(record.pictures, 255)
    record = dataclasses.replace(record, row_experts=ids, pictures=white)
    drawn = draw_patches(record)
    wanted = [ImageColor.getrgb(expert_color(e)) for e in (0, 1)] + [NOTHING]
    halves = {tuple((255 + value + 1) // 2 for value in color) for color in wanted}
    near = lambda color: (np.abs(drawn.astype(int) - color).max(axis=-1) <= 1).sum()
    # A patch is a quarter of a picture of 96 pixels.
    assert all(near(np.asarray(color)) >= 48 * 48 for color in halves)
    for picture in (draw_classes(record), draw_places(record)):
        assert picture.dtype == np.uint8 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 3


def test_models_without_tokens_are_refused():
    config = make_config()
    check_evaluators(config)
    dense = dataclasses.replace(config, model=dataclasses.replace(MODEL, moe=MoEConfig()))
    with pytest.raises(UserError, match="eval.metrics: 'routing' needs a model with experts"):
        check_evaluators(dense)


def test_packed_pictures_are_refused():
    config = make_config()
    data = dataclasses.replace(config.data, image_sizes=(4, 8), max_patches=5)
    with pytest.raises(UserError, match="eval.metrics: 'routing' needs pictures of one size"):
        check_evaluators(dataclasses.replace(config, data=data))
