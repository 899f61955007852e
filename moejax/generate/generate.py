"""Generation with a cache of keys and values: any prompt, several images inside, guidance."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int32

from moejax.config.decoder import DecoderConfig
from moejax.data.vocabulary import BOI, KINDS, PAD, PATCH, Vocabulary
from moejax.generate.cache import KVCache, init_cache, write_rows
from moejax.generate.grammar import (
    Grammar,
    Progress,
    advance,
    allowed_tokens,
    progress_of_prompt,
)
from moejax.generate.sampling import Sampling, choose, guide, mask_logits, row_keys
from moejax.ops.pictures import one_position_each
from moejax.parallel.mesh import mesh_of

# Prompts are padded to a multiple of this, so that few lengths are compiled.
_PROMPT_MULTIPLE = 16


class Generated(NamedTuple):
    """What was written after each prompt.

    Attributes:
      tokens: [b, max_new_tokens] with PAD after the end of a row.
      lengths: [b], tokens written, EOS included.
      finished: [b], False where ``max_new_tokens`` cut the row off before its EOS.
    """

    tokens: Int32[np.ndarray, "b t"]
    lengths: Int32[np.ndarray, " b"]
    finished: Bool[np.ndarray, " b"]

    def row(self, index: int) -> Int32[np.ndarray, " t"]:
        return self.tokens[index, : self.lengths[index]]


def generate(
    model: Any,
    params: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    *,
    grammar: Grammar,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    unconditional: Sequence[Sequence[int]] | None = None,
    latents: Sequence[np.ndarray] | None = None,
    limit: int | None = None,
) -> Generated:
    """Continues each prompt, all in one batch; compiles once for each shape.

    What a row gets depends on its prompt, ``seed`` and its number in ``row_ids``, never on the
    other rows.

    Args:
      model: decoder; called with ``cache``.
      params: its parameters.
      vocabulary: ids of its tokens.
      prompts: token ids of each row, from BOS on; of any lengths, none empty.
      grammar: what may be written.
      max_new_tokens: the most tokens to write.
      sampling: by default at temperature 1 without filters.
      seed: of all rows.
      row_ids: number of each row, by default 0, 1, ...
      unconditional: for guidance, each row's prompt without the condition; costs a second row.
        Without it ``sampling.guidance`` has no effect.
      latents: of a model whose pictures are latents, the clean patches of each prompt's pictures,
        [patches, z] in the order of their PATCH tokens. Such a model's row ends at a BOI, too:
        what follows is denoised, not written (moejax.generate.denoise).
      limit: the most tokens to write, where that is less than ``max_new_tokens``; unlike that one
        it compiles nothing anew.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("generate needs at least one prompt, and no empty one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    rows = list(prompts)
    if unconditional is not None:
        # Each row's two branches side by side, so that a batch split over devices keeps them so.
        pairs = zip(prompts, unconditional, strict=True)
        rows = [branch for pair in pairs for branch in pair]
    tokens, lengths = pad_prompts(rows)
    with mesh_of(params):
        written, count, finished = _generate(
            model,
            params,
            vocabulary,
            tokens,
            lengths,
            row_keys(seed, np.arange(len(prompts)) if row_ids is None else np.asarray(row_ids)),
            sampling or Sampling(),
            grammar,
            None if latents is None else place_latents(tokens, latents, model.config.latents.size),
            max_new_tokens if limit is None else min(limit, max_new_tokens),
            max_new_tokens=max_new_tokens,
            branches=1 if unconditional is None else 2,
        )
    return Generated(np.asarray(written), np.asarray(count), np.asarray(finished))


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [b, t] i32 padded on the right, lengths [b] i32)."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    tokens = np.full((len(prompts), width), PAD, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def place_latents(
    tokens: Int32[np.ndarray, "b t"], latents: Sequence[np.ndarray], size: int
) -> Float[np.ndarray, "b t z"]:
    """The patches of each row at its PATCH tokens, zeros elsewhere; ``size`` is z."""
    placed = np.zeros((*tokens.shape, size), np.float32)
    for row, patches in enumerate(latents):
        placed[row, tokens[row] == PATCH] = np.reshape(patches, (-1, size))
    return placed


def prefill(
    model: Any,
    params: Any,
    vocabulary: Vocabulary,
    tokens_bt,
    length_b,
    capacity: int,
    latents_btz=None,
) -> tuple[jax.Array, KVCache]:
    """Reads the prompts in one forward, their pictures as clean latents where there are any.

    Returns:
      (logits [b, v] after the last token of each row, cache of ``capacity`` slots).
    """
    b, t = tokens_bt.shape
    assert t <= capacity, f"{capacity} slots do not hold prompts of {t}"
    batch = _batch(model, vocabulary, tokens_bt, jnp.zeros_like(length_b), length_b)
    if latents_btz is not None:
        picture_bt = jnp.cumsum(tokens_bt == BOI, axis=1)
        batch["image_id"] = jnp.where(tokens_bt == PATCH, picture_bt, 0).astype(jnp.int32)
        batch["latents"] = latents_btz
    # Models of other packages need not know the length of a row.
    known = {"row_length": capacity} if depth_room(model) else {}
    out = model.apply({"params": params}, batch, train=False, **known)
    cache = write_rows(init_cache(model, params, b, capacity), out.rows, length_b)
    if latents_btz is not None and model.config.latents.one_position:
        names = ("positions", "image_id", "segments")
        position_bt = one_position_each(*(batch[name] for name in names))
        cache = cache.replace(position_b=position_bt[jnp.arange(b), length_b - 1] + 1)
    return out.logits[jnp.arange(b), length_b - 1], cache


def depth_room(model: Any) -> bool:
    """Whether some block of a model has room for some of a row's tokens only."""
    config: Any = getattr(model, "config", None)
    return isinstance(config, DecoderConfig) and config.depth.eval_room > 0


def decode(
    model: Any, params: Any, vocabulary: Vocabulary, cache: KVCache, token_b, active_b
) -> tuple[jax.Array, KVCache]:
    """Reads one more token of each active row.

    Returns:
      (logits [b, v], meaningless in rows that are not active; cache).
    """
    num_b = active_b.astype(jnp.int32)
    batch = _batch(model, vocabulary, token_b[:, None], cache.position_b, num_b)
    out = model.apply({"params": params}, batch, train=False, cache=cache.rows)
    return out.logits[:, 0], write_rows(cache, out.rows, num_b)


def _batch(model, vocabulary: Vocabulary, tokens_bt, start_b, num_b) -> dict[str, jax.Array]:
    """A decoder batch of tokens at positions ``start_b`` on, of which ``num_b`` are real."""
    modalities = model.config.modalities
    # Kinds that the model has no tower for never occur.
    towers_k = jnp.asarray([modalities.index(k) if k in modalities else 0 for k in KINDS])
    step_t = jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)[None, :]
    return {
        "tokens": tokens_bt,
        "modality": towers_k[vocabulary.kind_ids(tokens_bt)].astype(jnp.int32),
        "segments": (step_t < num_b[:, None]).astype(jnp.int32),
        "positions": start_b[:, None] + step_t,
    }


class _Carry(NamedTuple):
    step: jax.Array
    logits_bv: jax.Array  # of the next token, each row's branches side by side
    progress: Progress
    cache: KVCache
    written_bt: jax.Array
    count_b: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "vocabulary", "max_new_tokens", "branches"))
def _generate(
    model,
    params,
    vocabulary,
    tokens_bt,
    length_b,
    key_b,
    sampling,
    grammar,
    latents_btz,
    limit,
    *,
    max_new_tokens,
    branches,
):
    repeat = functools.partial(jnp.repeat, repeats=branches)

    def go_on(carry: _Carry):
        return (carry.step < limit) & ~carry.progress.done_b.all()

    def one_token(carry: _Carry) -> _Carry:
        step, logits, progress, cache, written_bt, count_b = carry
        logits_bv = logits[::branches]
        if branches == 2:
            logits_bv = guide(logits_bv, logits[1::2], sampling.guidance)
        allowed_bv = allowed_tokens(
            vocabulary, grammar, progress, step, limit - step, logits.shape[-1]
        )
        step_key_b = jax.vmap(lambda key: jax.random.fold_in(key, step))(key_b)
        token_b = choose(step_key_b, mask_logits(logits_bv, allowed_bv), sampling)
        token_b = jnp.where(progress.done_b, PAD, token_b)
        written_bt = written_bt.at[:, step].set(token_b)
        count_b += ~progress.done_b
        progress = advance(vocabulary, progress, token_b)
        logits, cache = decode(
            model, params, vocabulary, cache, repeat(token_b), repeat(~progress.done_b)
        )
        return _Carry(step + 1, logits, progress, cache, written_bt, count_b)

    b, t = tokens_bt.shape[0] // branches, tokens_bt.shape[1]
    capacity = t + max_new_tokens
    logits, cache = prefill(model, params, vocabulary, tokens_bt, length_b, capacity, latents_btz)
    first = _Carry(
        step=jnp.asarray(0),
        logits_bv=logits,
        progress=progress_of_prompt(
            vocabulary, grammar, tokens_bt[::branches], length_b[::branches]
        ),
        cache=cache,
        written_bt=jnp.full((b, max_new_tokens), PAD, jnp.int32),
        count_b=jnp.zeros((b,), jnp.int32),
    )
    last = lax.while_loop(go_on, one_token, first)
    return last.written_bt, last.count_b, last.progress.done_b
