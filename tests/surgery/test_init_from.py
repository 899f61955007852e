"""Which parameters a model begins with: names, shapes, towers, and what is said of the rest."""

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.surgery.init_from import Leaf, Load, Rules, Source, fill, plan

TOWERS = ("text", "image")


def shared(*shape):
    """A weight of [l, 1, ...] for all modalities."""
    return Leaf(shape, 1)


def untied(*shape, towers=TOWERS):
    return Leaf(shape, 1, towers)


DENSE = Source(
    "dense@5",
    {"embedding_vd": (9, 4), "head_dv": (4, 9), "stack/wi_mdf": (2, 1, 4, 6), "old/b": (3,)},
    TOWERS,
)


def test_what_fits_is_loaded_and_the_rest_is_named():
    here = {
        "embedding_vd": Leaf((9, 4)),
        "head_dv": Leaf((4, 11)),
        "stack/wi_mdf": shared(2, 1, 4, 6),
        "new_d": Leaf((4,)),
    }
    made = plan(here, DENSE, Rules(), TOWERS)
    assert made.loads == {
        "embedding_vd": Load("embedding_vd"),
        "stack/wi_mdf": Load("stack/wi_mdf"),
    }
    assert made.skipped == {"head_dv": "[4,9] there, [4,11] here", "new_d": "no new_d there"}
    assert made.unused == ("head_dv", "old/b")
    assert (made.parameters, made.values) == (4, 9 * 4 + 2 * 4 * 6)


def test_another_depth_or_rank_is_skipped():
    here = {"embedding_vd": Leaf((9, 4)), "stack/wi_mdf": untied(3, 2, 4, 6), "old/b": Leaf((3, 1))}
    made = plan(here, DENSE, Rules(broadcast=True), TOWERS)
    assert made.skipped["stack/wi_mdf"] == "[2,1,4,6] there, [3,2,4,6] here"
    assert made.skipped["old/b"] == "[3] there, [3,1] here"


def test_rename_takes_the_first_rule_and_an_empty_path_is_left_out():
    here = {"embedding_vd": Leaf((9, 4)), "new/c": Leaf((3,)), "head_dv": Leaf((4, 9))}
    rules = Rules(rename=((r"^new/(.)$", r"old/b"), ("^head_dv$", ""), ("new", "never")))
    with pytest.raises(UserError, match=r"init_rename\[2\]: 'new' is found in no parameter that"):
        plan(here, DENSE, rules, TOWERS)
    made = plan(here, DENSE, Rules(rename=rules.rename[:2]), TOWERS)
    assert made.loads["new/c"] == Load("old/b")
    assert made.skipped == {"head_dv": "left out by train.init_rename"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("embeding_vd", "x"), r"init_rename\[0\]: 'embeding_vd' .*did you mean 'embedding_vd'\?"),
        (("embedding", r"\9"), r"init_rename\[0\]: '\\\\9' is no replacement: invalid group"),
    ],
)
def test_rename_that_does_nothing_or_cannot_be_is_refused(rule, message):
    with pytest.raises(UserError, match=message) as error:
        plan({"embedding_vd": Leaf((9, 4))}, DENSE, Rules(rename=(rule,)), TOWERS)
    assert "\n" not in str(error.value)


def test_nothing_that_fits_is_refused_with_reasons():
    with pytest.raises(UserError, match=r"nothing of dense@5 fits .*x: no x there"):
        plan({"x": Leaf((1,))}, DENSE, Rules(), TOWERS)


def test_shared_weights_fill_towers_only_when_asked():
    here = {"embedding_vd": Leaf((9, 4)), "stack/wi_mdf": untied(2, 2, 4, 6)}
    made = plan(here, DENSE, Rules(), TOWERS)
    assert made.skipped == {
        "stack/wi_mdf": "shared there, 2 towers here; train.init_broadcast=True repeats it"
    }
    made = plan(here, DENSE, Rules(broadcast=True), TOWERS)
    assert made.loads["stack/wi_mdf"] == Load("stack/wi_mdf", (0, 0))
    assert made.values == 9 * 4 + 2 * 2 * 4 * 6


def test_weights_of_a_model_of_one_modality_are_its_tower():
    text = Source("text@1", {"w": (2, 1, 3)}, ("text",))
    made = plan({"w": untied(2, 2, 3)}, text, Rules(), TOWERS)
    assert made.loads == {"w": Load("w", (0, None))}
    assert made.skipped == {"w@image": "no such tower there"}
    assert made.values == 2 * 3


def test_towers_go_by_name():
    there = Source("mot@1", {"w": (2, 2, 3)}, ("image", "text"))
    made = plan(
        {"w": untied(2, 3, 3, towers=(*TOWERS, "speech"))}, there, Rules(), (*TOWERS, "speech")
    )
    assert made.loads == {"w": Load("w", (1, 0, None))}
    assert made.skipped == {"w@speech": "no such tower there"}
    # One tower of it, for a model of text alone.
    made = plan({"w": untied(2, 1, 3, towers=("text",))}, there, Rules(), ("text",))
    assert made.loads == {"w": Load("w", (1,))}
    # The same order needs no copying.
    same = Source("mot@1", {"w": (2, 2, 3)}, TOWERS)
    assert plan({"w": untied(2, 2, 3)}, same, Rules(), TOWERS).loads == {"w": Load("w")}
    # Towers of others, and none at all.
    here = {"w": untied(2, 2, 3, towers=("speech", "video")), "v": Leaf((1,))}
    there = Source("mot@1", {"w": (2, 2, 3), "v": (1,)}, TOWERS)
    made = plan(here, there, Rules(), ("speech", "video"))
    assert made.skipped == {"w": "towers of text, image there, of speech, video here"}
    made = plan({"w": shared(2, 1, 3), "v": Leaf((1,))}, there, Rules(), TOWERS)
    assert made.skipped == {"w": "2 towers there, shared here"}


def test_a_tower_can_begin_as_another():
    there = Source("mot@1", {"w": (2, 2, 3)}, TOWERS)
    rules = Rules(towers=(("image", "text"),))
    made = plan({"w": untied(2, 2, 3)}, there, rules, TOWERS)
    assert made.loads == {"w": Load("w", (0, 0))}
    with pytest.raises(
        UserError, match=r"init_towers\[0\]: this model has no modality 'imag'; did"
    ):
        plan({"w": untied(2, 2, 3)}, there, Rules(towers=(("imag", "text"),)), TOWERS)
    with pytest.raises(UserError, match=r"init_towers\[0\]: mot@1 has no modality 'speech'"):
        plan({"w": untied(2, 2, 3)}, there, Rules(towers=(("image", "speech"),)), TOWERS)
    with pytest.raises(UserError, match=r"init_towers\[0\]: \('image', 'text'\) does nothing"):
        plan({"embedding_vd": Leaf((9, 4))}, DENSE, rules, TOWERS)


def test_experts_begin_as_rows_of_what_is_there():
    """Of fewer experts, of the towers of an MLP, or of the one MLP that all share."""
    here = {"e/wi": Leaf((2, 4, 3, 6), expert_axis=1), "r": Leaf((2, 3, 4)), "s": Leaf((5,))}
    rules = Rules(experts=(0, 0, 1, 1))
    fewer = Source("seed@1", {"e/wi": (2, 2, 3, 6), "r": (2, 3, 2), "s": (5,)}, TOWERS)
    made = plan(here, fewer, rules, TOWERS)
    assert made.loads == {"e/wi": Load("e/wi", (0, 0, 1, 1), 1), "s": Load("s")}
    assert made.skipped == {"r": "[2,3,2] there, [2,3,4] here"}
    assert made.values == 2 * 4 * 3 * 6 + 5
    towers = Source("mot@1", {"ffn/wi": (2, 2, 3, 6)}, TOWERS)
    rename = (("^e/", "ffn/"),)
    made = plan(here, towers, Rules(rename=rename, experts=(0, 1, 1, 0)), TOWERS)
    assert made.loads == {"e/wi": Load("ffn/wi", (0, 1, 1, 0), 1)}
    dense = Source("dense@1", {"ffn/wi": (2, 1, 3, 6)}, TOWERS)
    made = plan(here, dense, Rules(rename=rename, experts=(0,) * 4), TOWERS)
    assert made.loads == {"e/wi": Load("ffn/wi", (0,) * 4, 1)}

    loaded = {"e/wi": np.arange(72.0).reshape(2, 2, 3, 6), "s": np.arange(5.0)}
    drawn = {name: np.zeros(leaf.shape) for name, leaf in here.items()}
    filled = fill(plan(here, fewer, rules, TOWERS), here, drawn, loaded)
    np.testing.assert_array_equal(filled["e/wi"], np.repeat(loaded["e/wi"], 2, axis=1))


def test_rows_of_experts_that_cannot_be_are_refused():
    here = {"e/wi": Leaf((2, 4, 3), expert_axis=1), "s": Leaf((5,))}
    there = Source("seed@1", {"e/wi": (2, 2, 3), "s": (5,)}, TOWERS)
    # Without rows the experts are another number, and stay as they are drawn.
    assert plan(here, there, Rules(), TOWERS).skipped == {"e/wi": "[2,2,3] there, [2,4,3] here"}
    with pytest.raises(UserError, match=r"init_experts\[3\]: e/wi of seed@1 has no row 2;"):
        plan(here, there, Rules(experts=(0, 0, 1, 2)), TOWERS)
    for rows in ((0, 1), (0, 0, 0, 1, 1)):
        with pytest.raises(UserError, match="init_experts: does nothing: no parameter of"):
            plan(here, there, Rules(experts=rows), TOWERS)
    other = Source("seed@1", {"e/wi": (2, 2, 7), "s": (5,)}, TOWERS)
    with pytest.raises(UserError, match="init_experts: does nothing"):
        plan(here, other, Rules(experts=(0, 0, 1, 1)), TOWERS)


def test_fill_puts_each_row_in_its_place():
    here = {"w": untied(2, 3, 2, towers=(*TOWERS, "speech")), "a": Leaf((2,)), "b": Leaf((2,))}
    there = Source("mot@1", {"w": (2, 2, 2), "a": (2,)}, ("image", "text"))
    made = plan(here, there, Rules(), (*TOWERS, "speech"))
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(size=leaf.shape) for name, leaf in here.items()}
    loaded = {name: rng.normal(size=shape) for name, shape in there.shapes.items()}
    filled = fill(made, here, drawn, loaded)
    assert filled.keys() == drawn.keys()
    np.testing.assert_array_equal(filled["a"], loaded["a"])
    np.testing.assert_array_equal(filled["b"], drawn["b"])
    expected = np.stack([loaded["w"][:, 1], loaded["w"][:, 0], drawn["w"][:, 2]], axis=1)
    np.testing.assert_array_equal(filled["w"], expected.astype(np.float32))
