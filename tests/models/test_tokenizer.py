"""The image tokenizer: the module, the frozen codec, and the weights that come with moejax."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from moejax.config import load_config
from moejax.config.schema import FSQAutoencoderConfig
from moejax.data.sources import open_source
from moejax.errors import UserError
from moejax.models.autoencoder import to_signed, to_uint8
from moejax.models.registry import MODELS
from moejax.models.tokenizer import builtin_codec_path, load_image_codec, save_image_codec
from moejax.ops.kmeans import fit_kmeans
from moejax.ops.patchify import patchify
from moejax.train.reconstruction import (
    image_mse,
    kmeans_decode,
    kmeans_encode,
    to_psnr,
)

TINY = FSQAutoencoderConfig(
    image_size=8, patch_size=4, levels=(4, 3), width=8, encoder_blocks=1, decoder_blocks=1
)


@functools.cache
def _init():
    return jax.jit(MODELS.get("fsq_autoencoder")(TINY).init)


def make_params(seed=0):
    model = MODELS.get("fsq_autoencoder")(TINY)
    batch = {"images": jnp.zeros((1, 8, 8, 3), jnp.uint8)}
    return model, meta.unbox(_init()(jax.random.key(seed), batch))["params"]


@functools.cache
def compiled(method=None):
    """``(params, inputs) -> outputs`` of the tiny model."""
    model = MODELS.get("fsq_autoencoder")(TINY)
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))


def pictures(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def builtin():
    return load_image_codec("builtin:fsq")


@pytest.fixture(scope="module")
def held_out():
    """Every fourth picture of the validation split."""
    source = open_source("builtin:emoji32", "val")
    return np.stack([source[index]["image"] for index in range(0, len(source), 4)])


@pytest.fixture
def tiny_codec(tmp_path):
    return save_image_codec(tmp_path / "tiny.npz", TINY, make_params()[1])


def test_model_output():
    _, params = make_params()
    images = pictures(3)
    out = compiled()(params, {"images": images})
    assert out.target.shape == out.reconstruction.shape == (3, 8, 8, 3)
    assert out.codes.shape == (3, 4) and out.codes.dtype == jnp.int32
    np.testing.assert_array_equal(to_uint8(out.target), images)
    codes = compiled("encode")(params, images)
    np.testing.assert_array_equal(out.codes, codes)
    decoded = compiled("decode")(params, codes)
    np.testing.assert_array_equal(decoded, to_uint8(out.reconstruction))


def test_reconstruction_depends_on_the_picture_through_its_codes_only():
    """Pictures that differ less than a code can tell come back as one and the same picture."""
    _, params = make_params()
    images = np.concatenate([pictures(1), pictures(1)])
    images[1, 0, 0, 0] ^= 1
    out = compiled()(params, {"images": images})
    np.testing.assert_array_equal(out.codes[0], out.codes[1])
    np.testing.assert_array_equal(out.reconstruction[0], out.reconstruction[1])
    assert not np.array_equal(out.target[0], out.target[1])


def test_augmentation_in_training_only():
    model, params = make_params()
    apply = jax.jit(
        lambda key, train: (
            model.apply(
                {"params": params}, {"images": pictures(8)}, train=train, rngs={"dropout": key}
            ).target
        ),
        static_argnums=1,
    )
    plain = np.asarray(to_signed(pictures(8)))
    np.testing.assert_allclose(apply(jax.random.key(0), False), plain, atol=1e-6)
    assert not np.allclose(apply(jax.random.key(0), True), plain, atol=1e-3)
    assert not np.array_equal(apply(jax.random.key(0), True), apply(jax.random.key(1), True))
    unchanged = dataclasses.replace(TINY, augment=False)
    out = MODELS.get("fsq_autoencoder")(unchanged).apply(
        {"params": params}, {"images": pictures(8)}, train=True
    )
    np.testing.assert_allclose(out.target, plain, atol=1e-6)


def test_pictures_of_another_size_are_a_user_error():
    model, params = make_params()
    with pytest.raises(UserError, match="model.image_size=8: the pictures are of 16 pixels"):
        model.apply({"params": params}, {"images": pictures(1, size=16)}, train=False)


def test_every_parameter_gets_a_gradient():
    model, params = make_params()

    def loss(params):
        out = model.apply({"params": params}, {"images": pictures(4)}, train=False)
        return jnp.square(out.reconstruction - out.target).mean()

    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)


def test_eight_devices_equal_one():
    """The first gradient does not depend on the mesh."""
    model, params = make_params()
    batch = {"images": pictures(8)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))

    @jax.jit
    def gradients(params, batch):
        def loss(params):
            out = model.apply({"params": params}, batch, train=False)
            return jnp.square(out.reconstruction - out.target).mean()

        return jax.grad(loss)(params)

    one, eight = gradients(params, batch), gradients(params, spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, eight)


def test_codes_do_not_depend_on_the_company(tiny_codec):
    images = pictures(70)
    codes = tiny_codec.encode(images)
    order = np.random.default_rng(1).permutation(len(images))
    np.testing.assert_array_equal(tiny_codec.encode(images[order]), codes[order])
    np.testing.assert_array_equal(tiny_codec.encode(images[5:6]), codes[5:6])
    np.testing.assert_array_equal(tiny_codec.decode(codes)[order], tiny_codec.decode(codes[order]))


def test_codec_inside_of_a_mesh(tiny_codec):
    """The training loop calls it under jax.set_mesh, from its data thread."""
    images = pictures(3)
    expected = tiny_codec.encode(images)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(tiny_codec.encode(images), expected)


def test_codec_shapes_and_errors(tiny_codec):
    assert (tiny_codec.num_codes, tiny_codec.grid, tiny_codec.codes_per_image) == (12, (2, 2), 4)
    assert tiny_codec.image_size == 8
    assert tiny_codec.encode(pictures(0)).shape == (0, 4)
    assert tiny_codec.decode(np.zeros((0, 4), int)).shape == (0, 8, 8, 3)
    decoded = tiny_codec.decode(np.arange(8).reshape(2, 4))
    assert decoded.shape == (2, 8, 8, 3) and decoded.dtype == np.uint8
    with pytest.raises(ValueError, match=r"expected uint8 images \[n, 8, 8, 3\]"):
        tiny_codec.encode(pictures(1, size=16))
    with pytest.raises(ValueError, match="expected uint8"):
        tiny_codec.encode(pictures(1).astype(np.float32))
    with pytest.raises(ValueError, match=r"codes must be in \[0, 12\), got 3..12"):
        tiny_codec.decode(np.array([[3, 4, 5, 12]]))


def test_saved_codec_loads_and_its_version_is_of_its_content(tmp_path, tiny_codec):
    images = pictures(4)
    again = load_image_codec(str(tmp_path / "tiny.npz"))
    assert again.version == tiny_codec.version
    assert again.config == TINY
    np.testing.assert_array_equal(again.encode(images), tiny_codec.encode(images))
    # Writing what was read changes nothing: float16 values are kept exactly.
    copy = save_image_codec(tmp_path / "copy.npz", again.config, again.params)
    assert copy.version == tiny_codec.version
    other = save_image_codec(tmp_path / "other.npz", TINY, make_params(seed=1)[1])
    assert other.version != tiny_codec.version


def test_wrong_specs_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="data.image_tokenizer: no built-in"):
        load_image_codec("builtin:vq")
    with pytest.raises(UserError, match="no file .*nowhere.npz"):
        load_image_codec(str(tmp_path / "nowhere.npz"))
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    params = make_params()[1]
    del params["patch_in"]["bias_f"]
    whole = save_image_codec(tmp_path / "whole.npz", TINY, make_params()[1])
    with np.load(tmp_path / "whole.npz") as file:
        stored = {name: file[name] for name in file.files}
    np.savez(tmp_path / "missing.npz", **{k: stored[k] for k in stored if "patch_in" not in k})
    head = json.loads(str(stored["head"]))
    head["config"]["width"] = 2 * whole.config.width
    np.savez(tmp_path / "shapes.npz", **{**stored, "head": np.asarray(json.dumps(head))})
    head["format"] = 99
    np.savez(tmp_path / "format.npz", **{**stored, "head": np.asarray(json.dumps(head))})
    for name in ("text", "other", "missing", "shapes", "format"):
        with pytest.raises(UserError, match=f"{name}.npz' is no image tokenizer"):
            load_image_codec(str(tmp_path / f"{name}.npz"))


def test_builtin_codec_has_the_promised_shape(builtin):
    assert builtin.num_codes == 1000
    assert builtin.grid == (8, 8) and builtin.codes_per_image == 64
    assert builtin.image_size == 32
    assert builtin_codec_path().stat().st_size < 2e6


def test_builtin_codec_is_the_one_described(builtin, held_out):
    """fsq.json is of these weights, and its figures are what they reach."""
    table = json.loads(builtin_codec_path().with_suffix(".json").read_text(encoding="utf-8"))
    assert table["version"] == builtin.version
    assert table["parameters"] == load_config("tokenizer_fsq").about.total_params
    for metrics in table["metrics"].values():
        assert metrics["psnr"] > metrics["kmeans_psnr"] + 1.5
        assert metrics["psnr_pooled"] > metrics["kmeans_psnr_pooled"] + 1.0
    rebuilt = builtin.decode(builtin.encode(held_out))
    # A quarter of the split: its mean is not that of the whole.
    assert abs(to_psnr(image_mse(held_out, rebuilt)).mean() - table["metrics"]["val"]["psnr"]) < 0.5


def test_builtin_codec_by_path_is_the_same(builtin, tmp_path):
    copy = tmp_path / "copy.npz"
    shutil.copy(builtin_codec_path(), copy)
    assert load_image_codec(str(copy)).version == builtin.version


def test_builtin_codec_beats_kmeans_on_held_out_pictures(builtin, held_out):
    """The claim of experiments/tokenizer_fsq, on a quarter of the split."""
    source = open_source("builtin:emoji32", "train")
    patches = patchify(np.stack([source[index]["image"] for index in range(len(source))]), 4)
    # Within 0.05 dB of the 25 rounds that the evaluator takes.
    centres = fit_kmeans(patches.reshape(-1, 48).astype(np.float32), builtin.num_codes, steps=4)
    codes = builtin.encode(held_out)
    learned = to_psnr(image_mse(held_out, builtin.decode(codes))).mean()
    patched = kmeans_decode(kmeans_encode(held_out, centres, 4), centres, 4)
    kmeans = to_psnr(image_mse(held_out, patched)).mean()
    assert learned > kmeans + 1.0, f"FSQ {learned:.2f} dB, k-means {kmeans:.2f} dB"
    # No codebook collapse: a small split uses a good part of the codes.
    assert len(np.unique(codes)) > 300
