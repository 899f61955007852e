"""MoMa, Lin et al. 2024, arXiv 2407.21770: experts of each modality, which choose their tokens.

Claim: at 1.4B parameters a token, four experts for text and four for pictures reach the dense
model's training loss with 3.7 times fewer FLOPs (text 2.6, image 5.2).

    moejax train --config moma           # or :small, :4t4i: laptop CPU, built-in data, float32
    moejax train --config moma:aux --config.train.init_from=runs/moma     # routers to decode with
    moejax train --config moma:1t1i --config.train.steps=100     # a seed, and its copies:
    moejax train --config moma:upcycle --config.train.init_from=runs/moma_1t1i
    moejax train --config moma:1.4b_4t4i # of the paper's sizes: 90m 435m 1.4b (as :1.4b), bfloat16

Each expert takes a quarter of its modality's tokens over the whole batch, by sigmoid scores that
also weigh its output: the FLOPs of ``chameleon``. What it takes depends on the batch, so ``aux``
trains causal routers with all else frozen; before that, evaluation chooses as training does.
Departures: no MoD; an upcycled run begins the data anew.
Parameters of ``moma``: 7.87M in total, 2.36M active. Device, minutes, expected loss: not
measured.
"""

from moejax.config import load_config_dict

# The size of ``chameleon`` that it is made of, width of an expert, batch, steps, parameters.
SIZES = {
    "90m": ("94m", 1365, 1536, 160_000, 209_724_928, 92_313_088),
    "435m": ("443m", 2730, 1536, 160_000, 1_845_350_400, 436_408_320),
    "1.4b": ("1.5b", 5461, 2048, 120_000, 7_113_646_080, 1_476_845_568),
}
SMALL = {
    "": (7_867_776, 2_362_752),
    "small": (7_867_776, 2_362_752),
    "4t4i": (7_867_776, 2_362_752),
    "upcycle": (7_867_776, 2_362_752),
    "aux": (7_902_592, 2_397_568),
    "1t1i": (3_146_112, 2_359_680),
}
ARGS = (*SMALL, *SIZES, *(f"{size}_4t4i" for size in SIZES))
# fmt: off
INFERRED = (
    "data.drop_text", "data.image_tokenizer", "data.order", "data.source", "data.text_tokenizer",
    "model.moe.hidden", "objective.z_loss", "optim.b1", "optim.b2", "optim.clip_norm", "optim.eps",
    "optim.weight_decay",
)
# fmt: on


def get_config(arg=""):
    arg = arg.removesuffix("_4t4i")
    config = load_config_dict(f"chameleon:{SIZES[arg][0]}" if arg in SIZES else "chameleon")
    model, moe, optim, about = config.model, config.model.moe, config.optim, config.about
    model.block_pattern, moe.hidden = ("moe",), 512
    experts = 1 if arg == "1t1i" else 4
    moe.num_experts = 2 * experts
    moe.allowed = (tuple(range(experts)), tuple(range(experts, 2 * experts)))
    about.paper, about.family = "arXiv 2407.21770", "mixture-of-experts"
    about.mechanism_test = "tests/papers/test_moma.py::test_experts_choose_tokens_of_their_modality"
    about.approximate, counts = (), SMALL.get(arg)
    if arg == "1t1i":
        # One expert a modality takes all, with weight 1: a feed-forward layer of its own.
        moe.top_k = 1
    else:
        moe.router.name, moe.routing_group = "expert_choice", 0
        moe.router.options = {
            "normalise": "sigmoid",
            "noise": "logistic" if arg == "upcycle" else "",
            "causal_rule": "aux_router" if arg == "aux" else "none",
        }
    if arg == "upcycle":
        config.train.init_experts = (0,) * experts + (1,) * experts
    if arg == "aux":
        moe.causal_router = True
        moe.losses = ({"name": "causal_router", "coefficient": 1.0},)
        optim.freeze = ("^(?!.*causal_router)",)
    if arg in SIZES:
        _, moe.hidden, config.data.batch_size, config.train.steps, *counts = SIZES[arg]
        optim.learning_rate, optim.schedule, optim.final_fraction = 1e-4, "linear", 0.01
        about.approximate = INFERRED
    about.total_params, about.active_params = counts
    return config
