"""Recursive transformer, as of Bae et al. 2025, arXiv 2507.10524: the same layers several times.

Claim: with a third of the weights it is 0.06 nats worse than the plain transformer of as many FLOPs
(2.847 against 2.782 at 16.5e18); of the ways to share, middle-cycle is the best.

    moejax train --config recursive              # middle-cycle; or :small: laptop CPU, float32
    moejax train --config recursive:cycle        # all layers over and over
    moejax train --config recursive:sequence     # each layer several times in a row
    moejax train --config recursive:middle_sequence

Between a first and a last layer of their own (not in ``cycle``, ``sequence``) two layers are run
three times. Departures: interleaved text and image codes, our widths.
Parameters of ``recursive``: 2.36M, all of them active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

# Parameters; weights of how many layers are run in one block, and how many such blocks there are.
SHARING = {
    "": (2_358_400, 2, 1),
    "small": (2_358_400, 2, 1),
    "cycle": (1_833_600, 2, 1),
    "sequence": (1_833_600, 1, 2),
    "middle_sequence": (2_358_400, 1, 2),
}
ARGS = tuple(SHARING)


def get_config(arg=""):
    config = load_config_dict("chameleon")
    model, recursion, about = config.model, config.model.recursion, config.about
    total, recursion.layers, blocks = SHARING[arg]
    model.norm_placement, model.qk_norm = "pre", "none"
    model.block_pattern, recursion.steps, recursion.router = ("recursive",), 3, "none"
    model.num_layers = blocks
    if arg not in ("cycle", "sequence"):
        model.first_blocks, model.last_blocks = ("untied",), ("untied",)
        model.num_layers = blocks + 2
    about.paper, about.family = "arXiv 2507.10524", "mixture-of-recursions"
    about.mechanism_test = "tests/papers/test_depth.py::test_recursion_is_the_unrolled_transformer"
    about.approximate = ()
    about.total_params = about.active_params = total
    return config
