"""Mixture-of-Recursions, Bae et al. 2025, arXiv 2507.10524: tokens that think for longer.

Claim: at 16.5e18 FLOPs two recursions with expert-choice routers reach 2.751 nats with 167M
parameters, the plain transformer 2.782 with 315M. At 135M parameters it loses.

    moejax train --config mor            # or mor:small: laptop CPU, built-in data, float32
    moejax train --config mor:sharing    # all steps use the keys and values of the first
    moejax train --config mor:token      # one router gives each token its number of steps
    moejax train --config mor:token_free # and is kept balanced by a bias instead of a loss
    moejax train --config mor:360m       # the paper's sizes: 135m 360m 730m 1.7b, bfloat16

Middle-cycle: a first and a last layer, between them layers that are run three times, by all, two
thirds, one third of the tokens. Departures: interleaved text and image codes in ``mor``; outside of
training a causal rule decides, where the authors' code chooses among all tokens; routers begin
like other weights. ``token`` and ``token_free`` compute all steps for all, unless
``model.recursion.room`` is set.
Parameters of ``mor``: 2.36M, all of them active. Val loss after 300 steps on CPU (seed 0): text
6.26 nats a token (unigram 6.49), image 5.53 nats a code (6.21); minutes: not measured alone.
"""

from moejax.config import load_config_dict

# Width, layers run, heads, key/value heads, hidden width, steps, parameters (SmolLM's skeletons).
SIZES = {
    "135m": (576, 30, 9, 3, 1536, 2, 84_954_816),
    "360m": (960, 32, 15, 5, 2560, 3, 165_177_600),
    "730m": (1536, 26, 24, 8, 4096, 2, 427_866_624),
    "1.7b": (2048, 24, 32, 32, 8192, 2, 973_137_920),
}
ARGS = ("", "small", "sharing", "token", "token_free", *SIZES)
# fmt: off
INFERRED = (
    "data.drop_text", "data.image_tokenizer", "data.order", "data.source", "data.text_tokenizer",
    "model.depth.threshold", "model.modalities", "objective.z_loss", "optim.eps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("chameleon:94m" if arg in SIZES else "chameleon")
    model, about = config.model, config.about
    depth, recursion = model.depth, model.recursion
    model.norm_placement, model.qk_norm = "pre", "none"
    model.first_blocks, model.last_blocks = ("untied",), ("untied",)
    model.block_pattern = ("recursive",)
    model.num_layers, recursion.steps, recursion.layers = 3, 3, 2
    recursion.router = "token" if arg.startswith("token") else "expert"
    recursion.share_kv = arg == "sharing"
    depth.gate, depth.gate_scale, depth.branch = "sigmoid", 0.1, "whole"
    depth.causal_rule, depth.causal_loss = "router", 0.001
    about.approximate, total = ("model.depth.threshold",), 2_358_784
    if arg == "token_free":
        recursion.balance.name, recursion.balance_loss = "sign", 0.0
        # A bias for each number of steps.
        total += recursion.steps
    if arg in SIZES:
        d, layers, heads, kv_heads, hidden, recursion.steps, total = SIZES[arg]
        model.update(d_model=d, num_heads=heads, num_kv_heads=kv_heads, ffn_hidden=(hidden,))
        model.update(vocab_size=49_152, tie_embeddings=True)
        recursion.layers = (layers - 2) // recursion.steps
        config.data.update(batch_size=1024, sequence_length=2048)
        config.optim.update(learning_rate=3e-3, schedule="wsd", b1=0.9, b2=0.95, clip_norm=1.0)
        config.optim.update(weight_decay=0.1, final_fraction=0.0)
        about.approximate = INFERRED
    about.paper, about.family = "arXiv 2507.10524", "mixture-of-recursions"
    about.mechanism_test = "tests/papers/test_depth.py::test_later_steps_have_fewer_tokens"
    about.total_params = about.active_params = total
    return config
