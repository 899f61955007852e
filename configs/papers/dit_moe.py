"""DiT-MoE, Fei et al. 2024, arXiv 2407.11633: a diffusion transformer of sparse experts.

Claim: a diffusion transformer whose MLPs are experts, two shared and two of many for each patch,
can be made as large as 16.5B parameters, of which a patch meets 3.1B (by our count 3.18B).

    moejax train --config dit_moe            # or dit_moe:small: laptop CPU, Fashion-MNIST, float32
    moejax train --config dit_moe:g_16e2a    # the paper's s_8e2a b_8e2a xl_8e2a g_16e2a, bfloat16
    moejax train --config dit_moe:upcycle --config.train.init_from=runs/dit_moe

Every block has SwiGLU experts four times as wide as the model; a patch's two are weighed by their
softmax over all, which is not divided by their sum, and the shared ones are one MLP of twice the
width, as in the authors' code. The loss of balance is 0.01 at best, in each layer, over all patches
of the batch. ``upcycle`` has twice the experts, all copies of the first one of the run that it
begins from. As in the code s and b are DDPM like ``dit``, the others, and the laptop's, rectified
flow with time logit-normal. Departures and what the sizes are for: as ``dit`` says. Quality,
small, at equal FLOPs, on two CPU cores: experiments/dit_moe.
"""

from moejax.config import load_config_dict

# width, layers, heads, experts, batch, parameters in all and active.
SIZES = {
    "s_8e2a": (384, 12, 6, 8, 256, 199_190_816, 71_788_832),
    "b_8e2a": (768, 12, 12, 8, 1024, 795_628_064, 286_020_128),
    "xl_8e2a": (1152, 28, 16, 8, 1024, 4_167_721_744, 1_492_280_080),
    "g_16e2a": (1408, 40, 16, 16, 1024, 16_503_108_880, 3_180_950_800),
}
ARGS = ("", "small", "upcycle", *SIZES)


def get_config(arg=""):
    config = load_config_dict("dit:s2" if arg in SIZES else "dit")
    model, moe, about = config.model, config.model.moe, config.about
    model.block_pattern = ("moe",)
    moe.num_experts, about.total_params, about.active_params = 8, 1_874_480, 694_832
    if arg in SIZES:
        width, layers, heads, moe.num_experts, batch, total, active = SIZES[arg]
        model.update(d_model=width, num_layers=layers, num_heads=heads, ffn_hidden=(4 * width,))
        config.data.batch_size = batch
        about.total_params, about.active_params = total, active
        inferred = ("train.steps",) if arg[0] in "sb" else ("train.steps", "data.batch_size")
        about.approximate += inferred
    elif arg == "upcycle":
        moe.num_experts, about.total_params, about.active_params = 16, 3_449_392, 696_880
        config.train.init_experts = (0,) * moe.num_experts
    if arg[:2] not in ("s_", "b_"):
        model.learned_range = config.objective.learned_range = False
        config.objective.update(process="flow", schedule="cosine")
        config.objective.times.distribution = "logit_normal"
    moe.top_k, moe.hidden, moe.shared_hidden = 2, 4 * model.d_model, 2 * model.d_model
    # The router of experts that are copied is drawn as the authors' code for that does.
    moe.score.options = {"init": "normal" if arg == "upcycle" else "uniform"}
    moe.losses = ({"name": "switch", "coefficient": 0.01},)
    about.paper, about.family = "arXiv 2407.11633", "diffusion-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_dit.py::test_experts_of_dit_moe"
    return config
