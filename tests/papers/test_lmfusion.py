"""What makes the ``lmfusion`` config LMFusion: the text stays as it is while pictures learn."""

import jax
import numpy as np

from moejax.analysis.params import abstract_batch
from moejax.config import load_config
from moejax.parallel.mesh import batch_sharding
from moejax.train.setup import prepare_model

# One row: BOS text BOI, four patches, EOI text EOS.
ROW = [1, 20, 3, 5, 5, 5, 5, 4, 21, 22, 2, 0]


def picture_batch(size: int) -> dict:
    tokens = np.tile(np.asarray(ROW, np.int32), (2, 1))
    is_patch = tokens == 5
    latents = np.random.default_rng(0).normal(size=(2, 12, size)) * is_patch[..., None]
    return {
        "tokens": tokens,
        "modality": is_patch.astype(np.int32),
        "segments": (tokens > 0).astype(np.int32),
        "positions": np.tile(np.arange(12, dtype=np.int32), (2, 1)),
        "targets": np.roll(tokens, -1, axis=1),
        "weights": (tokens > 0).astype(np.float32),
        "image_id": is_patch.astype(np.int32),
        "latents": latents.astype(np.float32),
    }


def test_text_logits_stay_bit_for_bit(tiny, tiny_batch):
    """Steps on pictures change the image tower and its adapter; without the freeze, the text."""
    tiny |= {"model.latents.grid": 2, "model.latents.channels": 3}
    tiny |= {"optim.warmup_steps": 0, "train.init_broadcast": False}
    tiny["model.latents.adapter"] = "linear"
    text = tiny_batch(0)

    def logits_before_and_after(**overrides):
        config = load_config("lmfusion", {**tiny, **overrides})
        setup = prepare_model(config, jax.devices()[:1])
        state = setup.recipe.create()
        read = jax.jit(lambda params: setup.model.apply({"params": params}, text).logits)
        step = setup.train_step()
        batch = picture_batch(config.model.latents.size)
        assert batch.keys() == abstract_batch(config).keys()
        with jax.set_mesh(setup.mesh):
            before, adapter = np.array(read(state.params)), _adapter(state.params)
            for _ in range(3):
                state, _ = step(state, jax.device_put(batch, batch_sharding(setup.mesh)))
            assert not np.array_equal(_adapter(state.params), adapter)
            return before, np.array(read(state.params))

    before, after = logits_before_and_after()
    np.testing.assert_array_equal(before, after)
    before, after = logits_before_and_after(**{"optim.freeze": ()})
    assert np.abs(before - after).max() > 1e-4


def _adapter(params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params["patch_adapter"])])
