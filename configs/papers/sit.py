"""SiT, Ma et al. 2024, arXiv 2401.08740: DiT's network on straight paths from noise to data.

Claim: with the same network, data and FLOPs, the velocity of a linear interpolant gives better
pictures than DiT's noise.

    moejax train --config sit            # or sit:small: laptop CPU, Fashion-MNIST, float32
    moejax train --config sit:xl2        # the sizes of dit: s2 b2 b4 l2 xl2 g2, bfloat16

Time runs from noise at 0 to data at 1, and is drawn evenly; all else is ``dit``'s. The sinusoids of
the authors' code are of the time itself, here of 1,000 times that, as in DiT. Departures and what
the sizes are for: as ``dit`` says. Quality, on two CPU cores: docs/diffusion.md (``text``, 6,000
steps, 26 minutes with other work beside it); experiments/dit_moe has the other direction of time.
"""

from moejax.config import load_config_dict

# Parameters: fewer numbers come out than of dit.
COUNTS = {
    "": 332_336,
    "small": 332_336,
    "latents": 327_176,
    "text": 699_120,
    "s2": 32_817_424,
    "b2": 130_220_560,
    "b4": 130_294_336,
    "l2": 457_603_088,
    "xl2": 674_525_968,
    "g2": 1_435_481_360,
}
ARGS = tuple(COUNTS)


def get_config(arg=""):
    config = load_config_dict(f"dit:{arg}" if arg else "dit")
    config.model.learned_range = config.objective.learned_range = False
    config.objective.update(process="flow", schedule="cosine", direction="to_data")
    about = config.about
    about.paper = "arXiv 2401.08740"
    about.total_params = about.active_params = COUNTS[arg]
    return config
