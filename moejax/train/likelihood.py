"""The "likelihood" evaluator: how well the next token is predicted, per modality.

Every target belongs to one *kind*: ``structure`` (the special tokens that frame captions and
pictures), ``text``, ``image`` or ``speech``. Reported for the split, over all its targets:

* ``loss``: nats per target; ``text/loss``, ``image/loss``, ...: of one kind;
* ``text/bits_per_byte``: bits of all text targets over the UTF-8 bytes that they spell;
* ``image/bits_per_code``, ``image/accuracy``: bits per image code (speech unit), and how often the
  likeliest token of the whole vocabulary is the right one;
* ``.../unigram_...``: the same for a unigram model, which knows the kind of each target and the
  frequencies of the training split (add-one smoothed over the vocabulary of that kind);
* ``source/<name>/<kind>/loss``: of one source of a mixture.

Where pictures are latents, the text is judged beside clean ones, and a patch has no target.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config.schema import Config
from moejax.data.vocabulary import PATCH
from moejax.train.evaluate import EVALUATORS, EvalContext

KINDS = ("structure", "text", "image", "speech")


@EVALUATORS.register("likelihood")
def likelihood(context: EvalContext) -> dict[str, float]:
    """See the module docstring. Needs a model with logits [b, t, v] and a token pipeline."""
    vocabulary = context.pipeline.vocabulary
    kind_of = kind_of_token(vocabulary)
    score = context.program("likelihood", functools.partial(_score, context.model))
    kinds_v = jnp.asarray(kind_of)
    baseline_v = unigram_nats(context.train_pipeline.token_counts(), kind_of)
    tokenizer = _text_tokenizer(context.config)
    sources = [spec for spec, _ in context.config.data.sources]

    sums = {name: np.zeros(len(KINDS)) for name in ("nats", "targets", "correct", "unigram")}
    by_source = {name: np.zeros((len(sources), len(KINDS))) for name in ("nats", "targets")}
    text_bytes = 0
    for batch, on_device in context.batches():
        scored = jax.device_get(score(context.params, on_device, kinds_v))
        for name, value_bk in scored.items():
            # Batches are added in float64: a split can be long.
            sums[name] += value_bk.sum(axis=0, dtype=np.float64)
            if sources and name in by_source:
                by_source[name] += np.einsum("bk,bs->sk", value_bk, batch["sources"])
        counted = np.asarray(predicts_token(batch))
        targets = batch["targets"][counted]
        np.add.at(sums["unigram"], kind_of[targets], baseline_v[targets])
        text_bytes += count_text_bytes(batch, vocabulary, kind_of, tokenizer)
    return {**_report(sums, text_bytes), **_report_sources(by_source, sources)}


def metric_names(config: Config) -> list[str]:
    """What :func:`likelihood` can return; a kind without a target is left out."""
    model = config.model
    possible = [kind in ("structure", *model.modalities) for kind in KINDS]
    # Pictures that are latents have no code as a target.
    possible[KINDS.index("image")] &= not model.latents.channels
    counts = np.asarray(possible, np.float64)
    ones = {name: counts for name in ("nats", "targets", "correct", "unigram")}
    sources = [spec for spec, _ in config.data.sources]
    each = {name: np.tile(counts, (len(sources), 1)) for name in ("nats", "targets")}
    return [*_report(ones, 1), *_report_sources(each, sources)]


likelihood.metric_names = metric_names


def predicts_token(batch: dict) -> Any:
    """Which positions [b, t] have a token as target that is neither padding nor a patch."""
    is_patch = (batch["tokens"] == PATCH) | (batch["targets"] == PATCH)
    return (batch["weights"] > 0) & ~is_patch


def _report(sums: dict[str, np.ndarray], text_bytes: int) -> dict[str, float]:
    targets = sums["targets"]
    report = {"loss": _ratio(sums["nats"].sum(), targets.sum())}
    for i, kind in enumerate(KINDS):
        if not targets[i]:
            continue
        nats, unigram = float(sums["nats"][i]), float(sums["unigram"][i])
        report[f"{kind}/loss"] = _ratio(nats, targets[i])
        if kind == "structure":
            continue
        report[f"{kind}/unigram_loss"] = _ratio(unigram, targets[i])
        if kind == "text":
            report["text/bits_per_byte"] = _ratio(nats / math.log(2), text_bytes)
            report["text/unigram_bits_per_byte"] = _ratio(unigram / math.log(2), text_bytes)
        else:
            report[f"{kind}/bits_per_code"] = _ratio(nats / math.log(2), targets[i])
            report[f"{kind}/unigram_bits_per_code"] = _ratio(unigram / math.log(2), targets[i])
            report[f"{kind}/accuracy"] = _ratio(sums["correct"][i], targets[i])
    return report


def _report_sources(sums: dict[str, np.ndarray], sources: Sequence[str]) -> dict[str, float]:
    return {
        f"source/{name}/{kind}/loss": _ratio(sums["nats"][s, k], sums["targets"][s, k])
        for s, name in enumerate(sources)
        for k, kind in enumerate(KINDS)
        if kind != "structure" and sums["targets"][s, k]
    }


def _ratio(total: float, count: float) -> float:
    return float(total) / float(count) if count else math.nan


def _score(model, params: Any, batch: dict, kinds_v: jax.Array) -> dict[str, jax.Array]:
    logits = model.apply({"params": params}, batch, train=False).logits
    return score_tokens(logits, batch, kinds_v)


def score_tokens(logits: jax.Array, batch: dict, kinds_v: jax.Array) -> dict[str, jax.Array]:
    """Sums per row and kind, each [b, len(KINDS)] float32: nats, targets, correct predictions."""
    targets = batch["targets"]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    nats_bt = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    correct_bt = jnp.argmax(logits, axis=-1) == targets
    is_kind_btk = jax.nn.one_hot(kinds_v[targets], len(KINDS)) * predicts_token(batch)[..., None]
    return {
        "nats": jnp.einsum("bt,btk->bk", nats_bt, is_kind_btk),
        "targets": is_kind_btk.sum(1),
        "correct": jnp.einsum("bt,btk->bk", correct_bt.astype(jnp.float32), is_kind_btk),
    }


def kind_of_token(vocabulary: Any) -> np.ndarray:
    """[v] int: index into KINDS of each token id."""
    ids = np.arange(vocabulary.size)
    first = (vocabulary.text_offset, vocabulary.image_offset, vocabulary.speech_offset)
    return np.sum([ids >= offset for offset in first], axis=0)


def unigram_nats(counts: np.ndarray, kind_of: np.ndarray) -> np.ndarray:
    """[v]: ``-log p(token | its kind)`` with add-one smoothing within the kind.

    Args:
      counts: [v] occurrences as a training target.
      kind_of: [v] from :func:`kind_of_token`.
    """
    smoothed = np.asarray(counts, np.float64) + 1
    totals = np.bincount(kind_of, weights=smoothed, minlength=len(KINDS))
    return np.log(totals[kind_of]) - np.log(smoothed)


def count_text_bytes(batch: dict, vocabulary: Any, kind_of: np.ndarray, tokenizer: Any) -> int:
    """UTF-8 bytes of the captions whose tokens are targets in ``batch``."""
    is_text = (batch["weights"] > 0) & (kind_of[batch["targets"]] == KINDS.index("text"))
    total = 0
    for targets, segments, chosen in zip(batch["targets"], batch["segments"], is_text, strict=True):
        for segment in np.unique(segments[chosen]):
            # A caption is decoded whole: one character may be spelt by several tokens.
            ids = vocabulary.to_text_ids(targets[chosen & (segments == segment)])
            total += len(tokenizer.decode(ids.tolist()).encode())
    return total


@functools.lru_cache(maxsize=4)
def _load_tokenizer(spec: str) -> Any:
    from moejax.data.text_tokenizer import load_text_tokenizer

    return load_text_tokenizer(spec)


def _text_tokenizer(config: Config) -> Any:
    return _load_tokenizer(config.data.text_tokenizer)
