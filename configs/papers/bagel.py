"""BAGEL, Deng et al. 2025, arXiv 2505.14683: one tower that understands, one that draws.

Claim: two towers by role, joined by self-attention in every layer, understand and draw in one
model: GenEval 0.80, DPG 85.07 with 7B active parameters of 14B (as arXiv 2511.20520 quotes it).

    moejax train --config bagel:text                 # the language model, from scratch
    moejax train --config bagel --config.train.init_from=runs/bagel_text
    moejax train --config bagel:moe ...    # the paper's other design: two MLPs, one attention
    moejax train --config bagel:7b --config.train.init_from=DIR    # a model of Qwen2.5-7B's shape

Text, and clean pictures before their text, go through the tower of text; pictures that are drawn
through the other, which begins as its copy. Departures: no bias in QKV, one linear map of the time;
read pictures are latents and not SigLIP features (nor both), and never dropped; what follows a
noisy picture sees it; BOI and EOI have positions of their own. Parameters of ``bagel``: 3.17M,
2.12M for a token. Device, minutes and expected loss: not measured.
"""

from moejax.config import default_config, load_config_dict

ARGS = ("", "text", "moe", "7b")
# fmt: off
INFERRED = (
    "data.batch_size", "data.image_tokenizer", "data.source", "data.text_first_share",
    "data.text_tokenizer", "data.sequence_length", "data.image_size", "model.vocab_size",
    "model.latents.read_by", "objective.text_weight", "objective.z_loss",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict("mot:transfusion_7b" if arg == "7b" else "mot:transfusion_small")
    model, about, objective, optim = config.model, config.about, config.objective, config.optim
    model.norm_placement, model.qk_norm = "pre", "rms"
    model.latents.one_position, model.latents.places = True, "sincos"
    model.latents.read_by = "text"
    objective.process, objective.times.distribution = "flow", "logit_normal"
    objective.text_weight, objective.image_weight = 0.25, 1.0
    objective.max_time_image_first = 0.0
    config.train.init_broadcast = True
    about.paper, about.family = "arXiv 2505.14683", "mixture-of-transformers"
    about.mechanism_test = "tests/papers/test_bagel.py::test_pictures_go_by_role"
    if arg == "text":
        for name in model.untie:
            model.untie[name] = False
        model.modalities = ("text",)
        model.latents = default_config().model.latents
        # A caption is a dozen tokens: rows of text alone are short.
        config.data.sequence_length = 64
        with config.unlocked():
            config.objective = default_config().objective
        config.train.init_broadcast = False
        config.eval.metrics = ("likelihood",)
        about.family = "dense"
        about.total_params = about.active_params = 2_102_656
    elif arg == "7b":
        model.d_model, model.num_layers, model.num_heads, model.num_kv_heads = 3584, 28, 28, 4
        model.ffn_hidden, model.vocab_size = (18_944,), 152_064
        model.rope_theta, model.norm_eps = 1e6, 1e-6
        # FLUX's autoencoder, 8 x smaller, in patches of 2 x 2.
        model.latents.channels, model.latents.grid, model.latents.patch = 16, 64, 2
        config.data.image_size = 512
        optim.learning_rate, optim.schedule, optim.warmup_steps = 1e-4, "constant", 2000
        optim.weight_decay, optim.eps, optim.ema_decay = 0.0, 1e-15, 0.9999
        config.train.steps = 500_000
        about.approximate = INFERRED
        about.total_params, about.active_params = 14_142_141_440, 7_616_641_536
    else:
        for name in ("qkv", "out", "norms", "final_norm") if arg == "moe" else ():
            model.untie[name] = False
        total = 2_908_544 if arg == "moe" else 3_172_096
        about.total_params, about.active_params = total, 2_122_112
    return config
