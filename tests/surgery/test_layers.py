"""Layers by their number, and experts that are slices of what is there."""

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.surgery.init_from import Leaf, Rules, Source, fill, plan
from moejax.surgery.layers import layers_of_blocks, recut

# Four dense layers, and every other one with two experts: two segments against one of two blocks.
DENSE = {
    "stack/segment_0/block_0/ffn/wi_mdf": (4, 1, 3, 8),
    "stack/segment_0/block_0/ffn/wo_mfd": (4, 1, 4, 3),
    "stack/segment_0/block_0/norm/scale_md": (4, 1, 3),
    "head_dv": (3, 5),
}
RENAME = (("moe/experts/wi_edf", "ffn/wi_mdf"), ("moe/experts/wo_efd", "ffn/wo_mfd"))


def mixed(experts: int, hidden: int) -> dict[str, Leaf]:
    """Blocks dense, moe, dense, moe of SwiGLU."""
    leaves = {"head_dv": Leaf((3, 5))}
    for block in range(2):
        leaves[f"stack/segment_0/block_{block}/norm/scale_md"] = Leaf((2, 1, 3), 1)
    leaves["stack/segment_0/block_0/ffn/wi_mdf"] = Leaf((2, 1, 3, 8), 1)
    leaves["stack/segment_0/block_0/ffn/wo_mfd"] = Leaf((2, 1, 4, 3), 1)
    own = "stack/segment_0/block_1/moe/"
    wi, wo = (2, experts, 3, 2 * hidden), (2, experts, hidden, 3)
    leaves[own + "experts/wi_edf"] = Leaf(wi, expert_axis=1, hidden_axis=3, hidden_parts=2)
    leaves[own + "experts/wo_efd"] = Leaf(wo, expert_axis=1, hidden_axis=2)
    leaves[own + "router/router_mde"] = Leaf((2, 1, 3, experts))
    return leaves


def begun(here: dict[str, Leaf], there: dict, rules: Rules):
    """(plan, arrays there, arrays to begin with)."""
    draw = np.random.default_rng(0)
    made = plan(here, Source("dense@1", there), rules)
    loaded = {name: draw.normal(size=shape).astype(np.float32) for name, shape in there.items()}
    drawn = {name: np.zeros(leaf.shape, np.float32) for name, leaf in here.items()}
    return made, loaded, jax.device_get(fill(made, here, drawn, loaded))


def test_numbers_of_layers():
    shapes = {
        "stack/segment_0/block_0/a": (1, 3),
        "stack/segment_1/block_1/a": (2, 3),
        "stack/segment_1/block_0/moe/b": (2, 3),
        "stack/segment_2/block_0/a": (3, 3),
        "head": (9, 9),
    }
    assert layers_of_blocks(shapes) == {
        "stack/segment_0/block_0/": (0,),
        "stack/segment_1/block_0/": (1, 3),
        "stack/segment_1/block_1/": (2, 4),
        "stack/segment_2/block_0/": (5, 6, 7),
    }


def test_cut_alike_or_of_another_depth_there_is_nothing_to_do():
    assert recut(DENSE, DENSE, DENSE) is None
    deeper = {name: (5, *shape[1:]) for name, shape in DENSE.items() if "stack" in name}
    assert recut({name: leaf.shape for name, leaf in mixed(2, 4).items()}, deeper, deeper) is None


def test_layers_find_their_own_in_other_segments():
    """Both ways: from one segment into blocks of a period, and back into one."""
    here = mixed(2, 4)
    made, loaded, filled = begun(here, DENSE, Rules(rename=RENAME, experts=(0, 0)))
    assert list(made.skipped) == ["stack/segment_0/block_1/moe/router/router_mde"]
    assert made.unused == ()
    dense = lambda name: loaded[f"stack/segment_0/block_0/{name}"]
    for block in range(2):
        scale = filled[f"stack/segment_0/block_{block}/norm/scale_md"]
        np.testing.assert_array_equal(scale, dense("norm/scale_md")[block::2])
    wi = filled["stack/segment_0/block_0/ffn/wi_mdf"]
    np.testing.assert_array_equal(wi, dense("ffn/wi_mdf")[0::2])
    for ours, theirs in (("wi_edf", "ffn/wi_mdf"), ("wo_efd", "ffn/wo_mfd")):
        experts = filled[f"stack/segment_0/block_1/moe/experts/{ours}"]
        np.testing.assert_array_equal(experts, np.repeat(dense(theirs)[1::2], 2, axis=1))

    there = {name: leaf.shape for name, leaf in here.items()}
    back = {name: Leaf(shape, 1) for name, shape in DENSE.items() if "stack" in name}
    made, loaded, filled = begun(back, there, Rules())
    scale = filled["stack/segment_0/block_0/norm/scale_md"]
    np.testing.assert_array_equal(scale[3], loaded["stack/segment_0/block_1/norm/scale_md"][1])
    # Layers 1 and 3 have no such weight there, though a block of that path has two.
    assert made.skipped["stack/segment_0/block_0/ffn/wi_mdf"].startswith("no stack/segment_0")


def test_a_rule_that_names_another_block_means_that_block():
    here = {"stack/segment_0/block_0/w": Leaf((1, 3)), "stack/segment_1/block_0/w": Leaf((3, 3))}
    there = {"stack/segment_0/block_0/w": (3, 3), "stack/segment_1/block_0/w": (1, 3)}
    rules = Rules(rename=(("segment_1", "segment_0"),))
    made, loaded, filled = begun(here, there, rules)
    first = loaded["stack/segment_0/block_0/w"]
    np.testing.assert_array_equal(filled["stack/segment_1/block_0/w"], first)
    np.testing.assert_array_equal(filled["stack/segment_0/block_0/w"], first[:1])


def swiglu(x, wi, wo):
    gate, up = np.split(x @ wi, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ wo


def test_slices_of_a_copy_are_together_what_it_was():
    """Three copies of two slices, of gate and up each; the sum of a copy's slices is the MLP."""
    here = mixed(6, 2)
    rules = Rules(rename=RENAME, experts=(0, 0, 0), slices=2)
    _, loaded, filled = begun(here, DENSE, rules)
    x = np.random.default_rng(1).normal(size=(7, 3))
    own = "stack/segment_0/block_1/moe/experts/"
    for layer in range(2):
        wi, wo = (filled[own + name][layer] for name in ("wi_edf", "wo_efd"))
        whole = [
            loaded[f"stack/segment_0/block_0/ffn/{n}"][1 + 2 * layer, 0]
            for n in ("wi_mdf", "wo_mfd")
        ]
        for copy in range(3):
            slices = [swiglu(x, wi[e], wo[e]) for e in (2 * copy, 2 * copy + 1)]
            assert np.abs(slices[0] - slices[1]).max() > 0.1
            np.testing.assert_allclose(sum(slices), swiglu(x, *whole), atol=1e-5)


def test_slices_that_do_not_fit_are_refused():
    rules = Rules(rename=RENAME, experts=(0, 0, 0), slices=2)
    with pytest.raises(UserError, match="no parameter of 6 experts .* of which init_slices are"):
        plan(mixed(5, 2), Source("dense@1", DENSE), rules)
    # The width of a whole copy, not of a slice.
    with pytest.raises(UserError, match="init_experts: does nothing"):
        plan(mixed(6, 4), Source("dense@1", DENSE), rules)
