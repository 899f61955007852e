"""RAPHAEL, Xue et al. 2023, arXiv 2305.18295: an expert for each time, an expert for each place.

Claim: text-to-image models get closer to their prompts where a block's experts divide up the steps
of diffusion (time-MoE) and the places that words are about (space-MoE).

    moejax train --config raphael        # or raphael:small: laptop CPU, Fashion-MNIST, float32
    moejax train --config raphael:text   # emoji, told by their English names

Time-MoE: of four experts in each block (a number that we could not confirm) the noise level alone
chooses one for the whole picture. Space-MoE, with ``text``: patches look at the words, and where
many look at one they run through the one of six experts that the word's gate chooses; the mean over
words is added (moejax/nn/words.py, moejax/experts/space.py). No code of the authors is public, and
their network is a U-Net of 3B parameters; how experts are drawn, weighed and kept in balance is not
said. Departures: no edge-supervised learning (it needs a detector of edges); else as ``dit`` says.
Device, minutes, quality: not measured.
"""

from moejax.config import load_config_dict

COUNTS = {
    "": (729_696, 336_480),
    "small": (729_696, 336_480),
    "text": (1_463_072, 1_069_856),
}
ARGS = tuple(COUNTS)


def get_config(arg=""):
    config = load_config_dict("dit:text" if arg == "text" else "dit")
    model, moe, about = config.model, config.model.moe, config.about
    model.block_pattern = ("moe",)
    moe.update(num_experts=4, top_k=1, hidden=4 * model.d_model, activation="gelu")
    moe.score.input = "noise"
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    if arg == "text":
        model.words.update(attend=True, num_experts=6, hidden=model.d_model)
    about.paper, about.family = "arXiv 2305.18295", "diffusion-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_dit_experts.py::test_a_time_has_one_expert"
    about.total_params, about.active_params = COUNTS[arg]
    about.approximate = (
        *about.approximate,
        "data.source",
        "model.block_pattern",
        "model.moe.activation",
        "model.moe.losses",
        "model.moe.num_experts",
        "model.moe.router.options",
        "model.num_layers",
        "model.words.hidden",
        "model.words.noise",
        "model.words.num_experts",
    )
    return config
