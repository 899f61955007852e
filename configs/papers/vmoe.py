"""V-MoE, Riquelme et al. 2021, arXiv 2106.05974: a vision transformer with sparse experts.

Claim: with experts in place of every other MLP, chosen by each patch, a vision transformer matches
the dense one of its quality at about half of the compute of inference.

    moejax train --config vmoe           # or :small: laptop CPU, Fashion-MNIST, float32
    moejax train --config vmoe:b16       # the paper's sizes: s32 b32 b16 l32 l16 h14 15b, bfloat16

Two of eight experts by noisy softmax, importance and load losses, places for 1.05 times the even
share, in order of the tokens; outside of training those of the highest weights are kept (batch
priority routing). Eight pictures are routed together, and all experts begin alike. The sizes and
the training on ImageNet-21k are those of the authors' code, which says "last 2" (odd blocks) of s32
and "every 2" of b16; where the others have experts is inferred, and all of ``15b`` but its number
of parameters. Departures: no biases in the blocks, no mixup and RandAugment; the paper's sizes are
for inspection. The dense baseline is ``vit``. Device, minutes, expected accuracy: not measured.
"""

from moejax.config import load_config_dict

# width, layers, heads, hidden width, patch, last n odd blocks (0: all), rate; total, active below.
SIZES = {
    "s32": (512, 8, 8, 2048, 32, 2, 1e-3),
    "b32": (768, 12, 12, 3072, 32, 0, 8e-4),
    "b16": (768, 12, 12, 3072, 16, 0, 8e-4),
    "l32": (1024, 24, 16, 4096, 32, 0, 6e-4),
    "l16": (1024, 24, 16, 4096, 16, 0, 4e-4),
    "h14": (1280, 32, 16, 5120, 14, 0, 3e-4),
    "15b": (1408, 48, 16, 6400, 14, 0, 3e-4),
}
COUNTS = {
    "": (651_530, 264_458),
    "s32": (67_347_283, 42_181_459),
    "b32": (302_367_315, 132_498_003),
    "b16": (300_710_739, 130_841_427),
    "l32": (1_032_368_467, 428_388_691),
    "l16": (1_030_159_699, 426_179_923),
    "h14": (2_126_462_803, 868_171_603),
    "15b": (14_687_559_763, 1_711_431_763),
}
ARGS = ("", "small", *SIZES)


def get_config(arg=""):
    config = load_config_dict("vit")
    model, moe, about = config.model, config.model.moe, config.about
    last = SIZES[arg][5] if arg in SIZES else 2
    if arg in SIZES:
        from_paper(config, arg)
    model.block_pattern = ("dense",) if last else ("dense", "moe")
    model.last_blocks = (("moe", "dense") * last)[:-1]
    moe.num_experts = 32 if arg == "15b" else 8
    moe.top_k, moe.routing_group, moe.equal_init = 2, 8, True
    moe.router.options = {"noise": "gaussian"}
    moe.losses = tuple({"name": name, "coefficient": 0.005} for name in ("importance", "load"))
    moe.capacity, moe.capacity_factor, moe.capacity_multiple = "order", 1.05, 4
    moe.eval_capacity, moe.eval_capacity_factor = "priority", 1.05
    about.paper, about.family = "arXiv 2106.05974", "vision-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_vision.py::test_vmoe_routes_by_priority"
    about.total_params, about.active_params = COUNTS[arg.replace("small", "")]
    return config


def from_paper(config, arg: str) -> None:
    """Sizes, ImageNet-21k and its training: sigmoid loss, clipped for the largest alone."""
    model = config.model
    model.d_model, model.num_layers, model.num_heads, hidden, model.patch_size, _, rate = SIZES[arg]
    model.update(ffn_hidden=(hidden,), ffn_activation="gelu", norm="layer", dtype="bfloat16")
    model.update(image_size=224, head="class_token", positions="learned", num_classes=21_843)
    model.class_bias, model.moe.activation = -10.0, "gelu"
    config.data.update(image_size=224, batch_size=4096)
    config.objective.loss = "sigmoid"
    config.objective.augment.crop_padding = 0
    config.optim.update(learning_rate=rate, schedule="linear", warmup_steps=10_000, b2=0.999)
    no_decay = ("norm", "bias", "scale")
    config.optim.update(final_fraction=1e-5 / rate, weight_decay=0.1, no_decay=no_decay)
    config.optim.clip_norm = 10.0 if arg in ("h14", "15b") else 0.0
    inferred = ("model.positions", "optim.eps", "optim.no_decay", "train.steps", "data.source")
    inferred += () if arg in ("s32", "b16") else ("model.block_pattern", "model.moe.num_experts")
    sizes = ("model.num_layers", "model.d_model", "model.ffn_hidden", "optim.clip_norm")
    config.about.approximate = inferred + (sizes if arg == "15b" else ())
