"""Vision transformers that begin as a dense one: sparse upcycling, and experts that are slices."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moejax.api import build
from moejax.config import load_config
from moejax.config.options import Options
from moejax.errors import UserError
from moejax.train.checkpoint import Checkpoints
from moejax.train.setup import prepare_model
from moejax.train.start import plan_start

pytestmark = pytest.mark.usefixtures("quick_compiles")
TINY = {
    "model.image_size": 8,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.ffn_hidden": (24,),
    "model.kernel_backend": "reference",
    "data.image_size": 8,
    "data.batch_size": 4,
}
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(workdir, features of the pictures) of a dense model of four blocks."""
    folder = tmp_path_factory.mktemp("dense")
    setup = prepare_model(load_config("vit", TINY), jax.devices()[:1])
    state = setup.recipe.create()
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, state, {}, setup.mesh)
    checkpoints.close()
    return folder, features(setup.model, state.params).pooled


def features(model, params):
    """Not the logits, which begin as 0."""
    apply = jax.jit(lambda params: model.apply({"params": params}, {"images": IMAGES}, record=True))
    return jax.device_get(apply(params))


def begun(spec: str, folder, overrides: dict | None = None):
    """(config, parameters) of a run that begins from the folder."""
    fields = {**TINY, "train.init_from": str(folder), **(overrides or {})}
    config = load_config(spec, fields)
    setup = prepare_model(config, jax.devices()[:1])
    start = plan_start(setup, folder / "new")
    assert start is not None
    routers = [name for name in start.plan.skipped if not name.endswith("router_mde")]
    assert not routers and not start.plan.unused
    return config, jax.device_get(start.create(setup.recipe).params)


def outputs(config, params, **moe):
    """The outputs of the model with other fields of ``model.moe``."""
    model = dataclasses.replace(config.model, moe=dataclasses.replace(config.model.moe, **moe))
    return features(build(dataclasses.replace(config, model=model))[0], params)


def router_of(config, **options) -> dict:
    """``model.moe.router`` with other options, to give to :func:`outputs`."""
    router = config.model.moe.router
    changed = Options(**{**router.options, **options})
    return {"router": dataclasses.replace(router, options=changed)}


def test_an_upcycled_model_is_its_dense_source(dense):
    """At step 0, where a patch's weights sum to 1; without that it is another model."""
    folder, expected = dense
    config, params = begun("sparse_upcycling:upcycle_top2", folder)
    experts = params["stack"]["segment_0"]["block_1"]["moe"]["experts"]["wi_edf"]
    np.testing.assert_array_equal(experts, np.repeat(experts[:, :1], 8, axis=1))
    assert np.abs(experts[0] - experts[1]).max() > 0.01, "two layers are not one"
    np.testing.assert_allclose(outputs(config, params).pooled, expected, atol=1e-5)
    raw = outputs(config, params, **router_of(config, renormalise=False)).pooled
    assert np.abs(raw - expected).max() > 1e-3

    # Experts that take all patches: none is left out.
    by_experts = load_config("sparse_upcycling:upcycle", TINY)
    options = router_of(by_experts, capacity_factor=8.0)
    np.testing.assert_allclose(outputs(by_experts, params, **options).pooled, expected, atol=1e-5)


def test_slices_of_a_copy_are_chosen_together(dense):
    """Dynamic-DINO: at step 0 the dense model, as the two experts of a patch are one whole copy."""
    folder, expected = dense
    config, params = begun("dynamic_dino:upcycle", folder, {"model.moe.hidden": 12})
    found = outputs(config, params)
    ids = found.aux["segment_0"]["block_1"]["moe"]["router"]["expert_ids"]
    assert ids.shape == (2, 4, 4, 2)
    assert (ids // 2 == ids[..., :1] // 2).all()
    np.testing.assert_array_equal(np.sort(ids % 2), np.broadcast_to([0, 1], ids.shape))
    assert len(np.unique(ids // 2)) > 1, "always the same copy"
    np.testing.assert_allclose(found.pooled, expected, atol=1e-5)

    # Columns that begin each by itself mix slices of different copies.
    other, params = begun(
        "dynamic_dino:upcycle",
        folder,
        {"model.moe.hidden": 12, "model.moe.score.options.alike": 1},
    )
    assert np.abs(outputs(other, params).pooled - expected).max() > 1e-3


def test_columns_that_begin_alike_divide_the_experts():
    overrides = {**TINY, "model.moe.score.options.alike": 3}
    with pytest.raises(UserError, match="score.options.alike: 3 columns .* do not divide the 8"):
        prepare_model(load_config("dynamic_dino", overrides), jax.devices()[:1])


def test_slices_make_more_subnets_than_copies():
    """Dynamic-DINO: C(N m, K) choices for a patch, of N copies in m slices, for C(N, K / m)."""
    config = load_config("dynamic_dino:upcycle")
    moe, copies, slices = config.model.moe, config.train.init_experts, config.train.init_slices
    of_slices = math.comb(moe.num_experts, moe.top_k)
    assert of_slices > math.comb(len(copies), moe.top_k // slices)
