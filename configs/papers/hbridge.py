"""HBridge, Wang et al. 2025, arXiv 2511.20520: unequal towers, joined in the middle layers only.

Claim: a frozen 7B model that understands and a 4B one that draws, which see each other in all but
the first and last six layers, are as good as BAGEL with a twelfth of its text-to-image tokens
(about 200B): DPG 85.23 to 85.07, GenEval 0.83 to 0.80.

    moejax train --config hbridge:text               # the model that understands, from scratch
    moejax train --config hbridge --config.train.init_from=runs/hbridge_text
    moejax train --config hbridge:7b --config.train.init_from=DIR    # of Qwen2.5-VL-7B's shape

The tower that draws is narrower; linear maps lead from its queries, keys and values to the heads of
the other, and back. Departures: no semantic reconstruction tokens (nor their loss), no modulation
by time, heads of one size, as many layers in both towers, no pretrained tower that draws.
Parameters of ``hbridge``: 2.81M, 2.12M for a token. Device, minutes and loss: not measured.
"""

from moejax.config import load_config_dict

ARGS = ("", "text", "7b")
# fmt: off
INFERRED = (
    "data.batch_size", "data.image_size", "data.image_tokenizer", "data.sequence_length",
    "data.source", "data.text_tokenizer", "model.ffn_hidden", "model.latents.channels",
    "model.latents.places", "model.num_layers", "model.qk_norm", "model.towers.heads",
    "model.towers.widths", "model.vocab_size", "objective.times", "optim.ema_decay", "optim.eps",
    "optim.schedule", "optim.warmup_steps", "optim.weight_decay", "train.steps",
)
# fmt: on


def get_config(arg=""):
    config = load_config_dict(f"bagel:{arg}" if arg else "bagel")
    about, model, objective = config.about, config.model, config.objective
    about.paper, about.family = "arXiv 2511.20520", "mixture-of-transformers"
    about.mechanism_test = "tests/papers/test_hbridge.py::test_towers_meet_in_the_middle_alone"
    if arg == "text":
        return config
    model.latents.one_position, model.latents.read_by = False, ""
    objective.text_weight, objective.max_time_image_first = 0.0, 1.0
    config.data.order = "text_first"
    config.train.init_broadcast = False
    config.train.init_rename = (("_text$", ""),)
    config.optim.freeze = ("@text", "embedding_vd", "head_dv")
    if arg == "7b":
        model.towers.widths, model.towers.heads = (3584, 2688), (28, 21)
        model.ffn_hidden, apart = (18_944, 10_240), 6
        config.train.steps = 200_000
        about.approximate = INFERRED
        about.total_params, about.active_params = 10_705_448_064, 7_616_182_784
    else:
        model.towers.widths, model.towers.heads = (128, 96), (4, 3)
        model.ffn_hidden, apart = (512, 384), 1
        about.total_params, about.active_params = 2_805_728, 2_116_480
    outer = (False,) * apart
    model.share_attention = outer + (True,) * (model.num_layers - 2 * apart) + outer
    return config
