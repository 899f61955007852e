"""A model of two layers on made-up token sequences: a run of many steps compiles in a second."""

import dataclasses

import flax.linen as nn
import numpy as np
import pytest

from moejax import axes
from moejax.config.schema import (
    MODEL_CONFIGS,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
)
from moejax.data.vocabulary import NUM_SPECIAL, Vocabulary
from moejax.models.decoder import DecoderOutput
from moejax.models.registry import MODELS
from moejax.train import setup as setups

VOCABULARY = Vocabulary(text_size=256, image_codes=12, codes_per_image=4)


@MODEL_CONFIGS.register("bigram")
@dataclasses.dataclass(frozen=True)
class BigramConfig(DecoderConfig):
    name: str = "bigram"
    vocab_size: int = VOCABULARY.size
    d_model: int = 16
    num_layers: int = 1
    dropout: float = 0.1


class Bigram(nn.Module):
    """Logits from the current token alone, with dropout so that the rng matters."""

    config: BigramConfig

    @nn.compact
    def __call__(self, batch, *, train=False):
        cfg = self.config
        named = nn.with_logical_partitioning
        embedding_vd = self.param(
            "embedding_vd",
            named(nn.initializers.normal(0.5), (axes.VOCABULARY, axes.EMBED)),
            (cfg.vocab_size, cfg.d_model),
        )
        scale_md = self.param(
            "gain_md",
            named(nn.initializers.ones_init(), (axes.MODALITY, axes.EMBED)),
            (2, cfg.d_model),
        )
        head_dv = self.param(
            "head_dv",
            named(nn.initializers.normal(0.5), (axes.EMBED, axes.VOCABULARY)),
            (cfg.d_model, cfg.vocab_size),
        )
        x_btd = embedding_vd[batch["tokens"]] * scale_md[batch["modality"]]
        x_btd = nn.Dropout(cfg.dropout, deterministic=not train)(x_btd)
        return DecoderOutput(x_btd @ head_dv, {}, {})


@MODELS.register("bigram")
def build_bigram(config: BigramConfig) -> Bigram:
    return Bigram(config)


class FakeSource(list):
    """Of a source, what the loop looks at: its length and its name."""

    name = "fake:rows"


class FakePipeline:
    """Rows ``text BOI codes EOI`` of random tokens; a batch is a function of its step."""

    version = "fake-1"
    vocabulary = VOCABULARY
    steps_per_epoch = 10
    # Steps whose loss is to be NaN, and what to do before the batch of a step is handed out.
    broken: frozenset[int] = frozenset()
    before = staticmethod(lambda step: None)

    def __init__(self, config, split):
        self.config, self.split = config, split
        self.source = FakeSource(range(80))

    def batch(self, step, rows=None):
        whole = self.whole_batch(step)
        return whole if rows is None else {name: x[list(rows)] for name, x in whole.items()}

    def whole_batch(self, step):
        rows, length = self.config.data.batch_size, self.config.data.sequence_length
        rng = np.random.default_rng([self.config.data.seed, step, len(self.split)])
        tokens = NUM_SPECIAL + 97 + rng.integers(0, 4, (rows, length))
        tokens[:, length // 2 :] = VOCABULARY.image_offset + rng.integers(
            0, 12, (rows, length - length // 2)
        )
        tokens = tokens.astype(np.int32)
        # Rows of different lengths: microbatches hold different numbers of targets.
        used = np.arange(length)[None] < rng.integers(length // 2, length + 1, (rows, 1))
        segments = used.astype(np.int32)
        targets = np.roll(tokens, -1, axis=1) * segments
        weights = (np.roll(used, -1, axis=1) & used).astype(np.float32)
        weights[:, -1] = 0
        if self.split == "train" and step in self.broken:
            weights[0, 0] = np.nan
        return {
            "tokens": tokens,
            "modality": (tokens >= VOCABULARY.image_offset).astype(np.int32),
            "segments": segments,
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy(),
            "targets": targets,
            "weights": weights,
        }

    def batches(self, start_step, rows=None):
        step = start_step
        while True:
            self.before(step)
            yield self.batch(step, rows)
            step += 1

    def record_ids(self, step):
        return [f"r{step}_{row}" for row in range(self.config.data.batch_size)]

    def eval_batches(self, limit=0):
        for step in range(limit or 2):
            yield self.batch(step)

    def token_counts(self):
        counts = np.zeros(VOCABULARY.size, np.int64)
        batch = self.batch(0)
        np.add.at(counts, batch["targets"][batch["weights"] > 0], 1)
        return counts


@pytest.fixture
def fake_data(monkeypatch):
    """Training reads FakePipeline; its class attributes can be set on the returned class."""

    class Pipeline(FakePipeline):
        pass

    def build_pipeline(config, split, *, codec=None):
        return Pipeline(config, split)

    monkeypatch.setattr(setups, "build_pipeline", build_pipeline)
    # Where it is used: a module first imported under a patch of its source would keep the patch.
    monkeypatch.setattr("moejax.models.picture_codec.load_image_codec", lambda spec: None)
    return Pipeline


class Codec:
    """Four codes a picture, each of a cell of one grey."""

    grid = (2, 2)

    def decode(self, codes):
        return np.repeat(codes.reshape(-1, 2, 2, 1), 3, axis=3).astype(np.uint8)


@pytest.fixture
def pictures(fake_data, monkeypatch):
    """``fake_data`` whose pictures can be drawn."""
    monkeypatch.setattr("moejax.models.picture_codec.load_picture_codec", lambda config: Codec())
    return fake_data


def make_config(**fields) -> Config:
    """The config of the bigram; ``fields`` are ``group__field=value``."""
    groups = {
        "model": BigramConfig(),
        "data": DataConfig(batch_size=8, sequence_length=16, text_tokenizer="bytes"),
        "optim": OptimConfig(learning_rate=0.05, warmup_steps=2),
        "train": TrainConfig(steps=12, checkpoint_every=5, max_skipped=3),
        "eval": EvalConfig(batches=1, every=6),
        "log": LogConfig(every=4),
    }
    for name, value in fields.items():
        group, _, field = name.partition("__")
        base = groups.get(group) or getattr(Config(), group)
        groups[group] = dataclasses.replace(base, **{field: value})
    return Config(**groups)
