"""Generation: equal to full forwards, within the grammar, and each row for itself."""

import jax
import numpy as np
import pytest

from moejax.config.schema import Config, MeshConfig
from moejax.data.vocabulary import BOI, BOS, EOI, EOS, PAD
from moejax.generate.generate import _generate, generate
from moejax.generate.grammar import IMAGE_ONLY, TEXT_ONLY, Grammar, Progress, allowed_tokens
from moejax.generate.sampling import Sampling
from moejax.nn import attention
from moejax.parallel.local import axis_size, run_local
from moejax.parallel.mesh import make_mesh
from moejax.parallel.rules import state_shardings

GREEDY = Sampling(temperature=0.0)
# One shape of batch for nearly all tests: each shape is a program to compile.
ROWS, STEPS = 4, 16
BARE = [[BOS, BOI]] * ROWS


def run(tiny, prompts, grammar, **options):
    return generate(
        tiny.model,
        tiny.params,
        tiny.vocabulary,
        prompts,
        grammar=grammar,
        max_new_tokens=STEPS,
        **options,
    )


def run_seeds(
    tiny, prompts, grammar, seeds: int, **options
) -> list[tuple[list[int], list[int], bool]]:
    """(prompt, what was written, finished) of every row and seed."""
    found = []
    for seed in range(seeds):
        result = run(tiny, prompts, grammar, seed=seed, **options)
        found += [
            (prompt, result.row(i).tolist(), bool(result.finished[i]))
            for i, prompt in enumerate(prompts)
        ]
    return found


def next_allowed(vocabulary, row, images_left: int, remaining: int) -> list[int]:
    """The interleaved grammar, written anew: ids that may follow ``row``."""
    marks = [token for token in row if token in (BOI, EOI)]
    if marks and marks[-1] == BOI:
        codes = len(row) - 1 - max(i for i, token in enumerate(row) if token == BOI)
        if codes == vocabulary.codes_per_image:
            return [EOI]
        return list(range(vocabulary.image_offset, vocabulary.size))
    ids = [EOS, *range(vocabulary.text_offset, vocabulary.image_offset)]
    if images_left and remaining >= vocabulary.codes_per_image + 2:
        ids.append(BOI)
    return ids


def greedy_by_full_forwards(tiny, prompt, images: int, max_new_tokens: int) -> list[int]:
    row, written = list(prompt), []
    for step in range(max_new_tokens):
        allowed = next_allowed(
            tiny.vocabulary, row, images - written.count(BOI), max_new_tokens - step
        )
        logits = tiny.logits([row])[0, len(row) - 1]
        token = max(allowed, key=lambda i: logits[i])
        row.append(token)
        written.append(token)
        if token == EOS:
            break
    return written


def check_images(vocabulary, row):
    """Every BOI is followed by exactly codes_per_image codes and EOI; no code lies elsewhere."""
    row, inside = list(row), set()
    for start in (i for i, token in enumerate(row) if token == BOI):
        end = start + 1 + vocabulary.codes_per_image
        assert all(vocabulary.kind(token) == "image" for token in row[start + 1 : end])
        assert row[end] == EOI
        inside.update(range(start + 1, end))
    outside = [token for i, token in enumerate(row) if i not in inside]
    assert all(vocabulary.kind(token) != "image" for token in outside)
    return len(inside) // vocabulary.codes_per_image


@pytest.fixture
def prompts(image, text):
    return [
        [BOS, *text(0, 3), BOI],
        [BOS, *image(1)],
        [BOS, *text(2, 2), *image(3), *text(4, 1)],
        [BOS],
    ]


def test_greedy_with_cache_equals_greedy_by_full_forwards(tiny, prompts):
    result = run(tiny, prompts, Grammar(images=2), sampling=GREEDY)
    for i, prompt in enumerate(prompts):
        assert result.row(i).tolist() == greedy_by_full_forwards(tiny, prompt, 2, STEPS)


def test_an_image_is_its_codes_then_eoi_eos(tiny, text):
    codes = tiny.vocabulary.codes_per_image
    prompts = [[BOS, *text(0, 5), BOI], [BOS, BOI], [BOS, *text(1, 1), BOI], [BOS, BOI]]
    for _, row, finished in run_seeds(tiny, prompts, IMAGE_ONLY, 3):
        assert all(tiny.vocabulary.kind(token) == "image" for token in row[:codes])
        assert row[codes:] == [EOI, EOS]
        assert finished


def test_text_has_no_image_ids_and_ends_at_eos(tiny, image):
    prompts = [[BOS, *image(seed)] for seed in range(ROWS)]
    found = run_seeds(tiny, prompts, TEXT_ONLY, 6, sampling=Sampling(temperature=2.0))
    assert {finished for _, _, finished in found} == {True, False}
    for _, row, finished in found:
        # Not one caption is empty (min_text), and none goes on after its end.
        assert all(tiny.vocabulary.kind(token) == "text" for token in row[:-1])
        assert tiny.vocabulary.kind(row[0]) == "text"
        assert (row[-1] == EOS) == finished
        assert finished or len(row) == STEPS


def test_pad_follows_the_end_of_a_row(mot, image):
    prompts = [[BOS, *image(seed)] for seed in range(ROWS)]
    result = run(mot, prompts, IMAGE_ONLY)
    np.testing.assert_array_equal(result.tokens, [[EOS] + [PAD] * (STEPS - 1)] * ROWS)
    np.testing.assert_array_equal(result.lengths, [1] * ROWS)


def test_interleaved_text_holds_whole_images_only(tiny, prompts):
    found = run_seeds(tiny, prompts, Grammar(images=2), 12, sampling=Sampling(3.0))
    for prompt, row, _ in found:
        check_images(tiny.vocabulary, [*prompt, *row])
        assert {PAD, BOS}.isdisjoint(row)
    assert {row.count(BOI) for _, row, _ in found} == {0, 1, 2}


def test_an_image_is_only_opened_if_it_can_be_closed(mot):
    progress = Progress(np.array([-1]), np.array([1]), np.array([False]))
    # BOI, four codes and EOI are six tokens: one fewer leaves no room.
    for remaining, expected in ((6, True), (5, False)):
        allowed = allowed_tokens(
            mot.vocabulary, Grammar(images=1), progress, 0, remaining, mot.vocabulary.size
        )
        assert bool(allowed[0, BOI]) == expected
        assert allowed[0, mot.vocabulary.text_offset] and allowed[0, EOS]


def test_a_prompt_may_stop_inside_an_image(tiny, image):
    prompts = [[BOS, *image(i)[: i + 1]] for i in range(ROWS)]
    for prompt, row, _ in run_seeds(tiny, prompts, IMAGE_ONLY, 1):
        assert check_images(tiny.vocabulary, [*prompt, *row]) == 1
        assert row[-2:] == [EOI, EOS]


@pytest.fixture
def captions(text):
    """Prompts of unequal length for an image."""
    return [[BOS, *text(seed, 2 + seed), BOI] for seed in range(ROWS)]


def test_guidance_of_one_is_the_conditional_model(tiny, captions):
    plain = run(tiny, captions, IMAGE_ONLY, seed=3)
    guided = run(tiny, captions, IMAGE_ONLY, seed=3, unconditional=BARE)
    np.testing.assert_array_equal(guided.tokens, plain.tokens)


def test_guidance_of_zero_is_the_unconditional_model(tiny, captions):
    plain = run(tiny, BARE, IMAGE_ONLY, seed=3)
    options = {"seed": 3, "unconditional": BARE}
    guided = run(tiny, captions, IMAGE_ONLY, sampling=Sampling(guidance=0.0), **options)
    np.testing.assert_array_equal(guided.tokens, plain.tokens)
    strong = run(tiny, captions, IMAGE_ONLY, sampling=Sampling(guidance=6.0), **options)
    assert (strong.tokens != plain.tokens).any()


def test_guided_greedy_is_the_formula_by_full_forwards(tiny, captions):
    weight, offset = 2.5, tiny.vocabulary.image_offset
    result = run(
        tiny, captions, IMAGE_ONLY, sampling=Sampling(0.0, guidance=weight), unconditional=BARE
    )
    for i, prompt in enumerate(captions):
        written: list[int] = []
        for _ in range(tiny.vocabulary.codes_per_image):
            starts = [prompt + written, BARE[0] + written]
            both = tiny.logits(starts)
            cond, uncond = (both[j, len(start) - 1] for j, start in enumerate(starts))
            # Constants of the two softmaxes shift all tokens alike.
            scores = uncond + weight * (cond - uncond)
            written.append(offset + int(np.argmax(scores[offset:])))
        assert result.row(i).tolist() == [*written, EOI, EOS]


def test_a_row_gets_the_same_tokens_alone_and_in_any_batch(tiny, prompts):
    options = {"grammar": Grammar(images=2), "seed": 11}
    together = run(tiny, prompts, **options)
    backwards = run(tiny, prompts[::-1], row_ids=[3, 2, 1, 0], **options)
    for i, prompt in enumerate(prompts):
        alone = run(tiny, [prompt], row_ids=[i], **options)
        assert alone.row(0).tolist() == together.row(i).tolist()
        assert backwards.row(len(prompts) - 1 - i).tolist() == together.row(i).tolist()


def test_rows_of_one_prompt_differ_and_seeds_repeat(mot, captions):
    prompts = captions[:1] * ROWS
    first, again = (run(mot, prompts, IMAGE_ONLY, seed=5).tokens for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({row.tobytes() for row in first}) > 1
    assert (run(mot, prompts, IMAGE_ONLY, seed=6).tokens != first).any()


def test_one_program_serves_all_prompts_and_settings(mot, captions, prompts):
    run(mot, captions, IMAGE_ONLY)
    before = _generate._cache_size()
    run(mot, prompts, TEXT_ONLY, sampling=GREEDY, seed=1)
    run(mot, captions[::-1], Grammar(images=3), sampling=Sampling(0.5, 3, 0.9), seed=2)
    assert _generate._cache_size() == before


def test_parameters_sharded_over_devices_give_the_same_tokens(mot, captions, monkeypatch):
    """A model restored on a mesh is sampled from as it lies."""
    expected = run(mot, captions, IMAGE_ONLY, sampling=GREEDY).tokens
    config = Config(model=mot.model.config, mesh=MeshConfig(data=2, fsdp=4))
    names = ("tokens", "modality", "segments", "positions")
    batch = {name: np.zeros((1, 1), np.int32) for name in names}
    boxed = jax.eval_shape(lambda: mot.model.init(jax.random.key(0), batch))
    shardings = state_shardings(make_mesh(config.mesh), boxed["params"])
    params = jax.device_put(mot.params, shardings)
    # Layers see the mesh, so that experts would be found on other devices.
    seen = set()

    def spying(*operands, **options):
        seen.add(axis_size("fsdp"))
        return run_local(*operands, **options)

    monkeypatch.setattr(attention, "run_local", spying)
    got = generate(
        mot.model,
        params,
        mot.vocabulary,
        captions,
        grammar=IMAGE_ONLY,
        max_new_tokens=STEPS,
        sampling=GREEDY,
    )
    np.testing.assert_array_equal(got.tokens, expected)
    assert seen == {4}


def test_a_prompt_without_tokens_is_refused(mot):
    for prompts in ([], [[BOS], []]):
        with pytest.raises(ValueError, match="prompt"):
            run(mot, prompts, TEXT_ONLY)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(
            mot.model, mot.params, mot.vocabulary, [[BOS]], grammar=TEXT_ONLY, max_new_tokens=0
        )
