"""MoDE, Reuss et al. 2024, arXiv 2412.12953: experts of noise levels, whose choice can be cached.

Claim: a denoiser whose router sees the noise level alone is as good as larger dense ones, and, as a
sampler's noise levels are known, can run at the cost of a dense model.

    moejax train --config mode           # or mode:small: laptop CPU, Fashion-MNIST, float32
    moejax train --config mode:policy    # the authors' size, bfloat16
    moejax sample --workdir runs/mode --cache-experts --denoise-steps 10 --spacing exponential

Four SwiGLU experts in each block, of which training draws two by their probabilities, without
putting them back, and evaluation takes the likeliest two; weights over their sum. EDM with log-
logistic noise levels. ``--cache-experts`` makes the chosen experts of each level of the sampler one
wide dense layer. Departures: pictures in place of a robot's actions; blocks told by adaLN, where
the authors add the noise to what attention reads and have it as a token too; experts are added to
their input, and to what the norm made of it there; no biases; a router of two matrices, twice the
width, and GELU (four times, SwiGLU and biases there); the balance is a mean over layers there, so
that its coefficient is divided here; the noise level is embedded as 1000 times EDM's
log(sigma) / 4. Device, minutes, quality: not measured.
"""

from moejax.config import load_config_dict

COUNTS = {
    "": (1_022_768, 629_552),
    "small": (1_022_768, 629_552),
    "policy": (759_620_624, 457_630_736),
}
ARGS = tuple(COUNTS)


def get_config(arg=""):
    config = load_config_dict("dit:b2" if arg == "policy" else "dit")
    model, moe, optim, about = config.model, config.model.moe, config.optim, config.about
    if arg == "policy":
        model.update(d_model=1024, num_heads=8, num_layers=12, ffn_hidden=(4096,))
        optim.update(b1=0.9, b2=0.95, weight_decay=0.05)
    model.learned_range = config.objective.learned_range = False
    model.update(norm="rms", qk_norm="rms", block_pattern=("moe",))
    config.objective.update(process="edm", schedule="cosine", sigma_data=0.5)
    config.objective.update(sigma_min=0.001, sigma_max=80.0)
    config.objective.times.update(distribution="log_logistic", mean=-0.6931, std=0.5)
    moe.update(num_experts=4, top_k=2, hidden=4 * model.d_model, activation="swiglu")
    moe.score.update(name="mlp", input="noise")
    moe.score.options = {
        "hidden": 2 * model.d_model,
        "activation": "gelu",
        "init_std": 0.02,
        "wi_std": 0.02,
    }
    moe.router.options = {"noise": "gumbel", "noisy_weights": False, "renormalise": True}
    balance = {"counted": "all", "weighted": True, "per": "batch"}
    coefficient = 0.01 / model.num_layers
    moe.losses = ({"name": "gshard", "coefficient": coefficient, "options": balance},)
    about.paper, about.family = "arXiv 2412.12953", "diffusion-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_dit_experts.py::test_mode_draws_by_the_noise_alone"
    about.total_params, about.active_params = COUNTS[arg]
    about.approximate = (
        *about.approximate,
        "data.batch_size",
        "data.source",
        "model.moe.score.options",
        "objective.times.mean",
        "objective.times.std",
        "train.steps",
    )
    return config
