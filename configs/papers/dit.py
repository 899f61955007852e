"""DiT, Peebles and Xie 2022, arXiv 2212.09748: a transformer that denoises latents.

Claim: a vision transformer whose blocks are shifted, scaled and gated by the noise level and the
class replaces the U-Net of diffusion models, and gets better with its FLOPs.

    moejax train --config dit            # or dit:small: laptop CPU, Fashion-MNIST, float32
    moejax train --config dit:latents    # emoji, in the latents of the built-in autoencoder
    moejax train --config dit:text       # emoji, told by their English names
    moejax train --config dit:xl2        # the paper's sizes: s2 b2 b4 l2 xl2; and g2; bfloat16

DDPM of 1,000 steps on the linear schedule, noise and the range of its variance predicted, one label
in ten left out for guidance, a moving average of the weights. The sizes are for latents of 32x32x4
of ImageNet at 256 pixels; without their autoencoder they are for inspection. Without ``latents``
ours denoise pixels, at our own width, rate and warm-up; texts are ours too. Departures: no biases
in attention and MLPs, initial weights by fan-in; neither latents nor clothes are mirrored; the
average's decay rises to the paper's 0.9999 in 90,000 steps. Device, minutes, quality: not measured.
"""

from moejax.config import default_config

# width, layers, heads, patch, parameters.
SIZES = {
    "s2": (384, 12, 6, 2, 32_823_584),
    "b2": (768, 12, 12, 2, 130_232_864),
    "b4": (768, 12, 12, 4, 130_343_552),
    "l2": (1024, 24, 16, 2, 457_619_488),
    "xl2": (1152, 28, 16, 2, 674_544_416),
    "g2": (1408, 40, 16, 2, 1_435_503_904),  # that of DiT-MoE's G, arXiv 2407.11633
}
LAPTOP = {"": 335_456, "small": 335_456, "latents": 327_696, "text": 702_240}
ARGS = (*LAPTOP, *SIZES)


def get_config(arg=""):
    config = default_config("dit", "diffusion")
    model, data, about = config.model, config.data, config.about
    model.learned_range = config.objective.learned_range = True
    config.objective.update(process="ddpm", schedule="linear", label_dropout=0.1)
    config.optim.update(schedule="constant", weight_decay=0.0, b2=0.999)
    about.paper, about.family = "arXiv 2212.09748", "diffusion-transformer"
    about.mechanism_test = "tests/models/test_dit.py::test_blocks_begin_as_the_identity"
    if arg in SIZES:
        *sizes, about.total_params = SIZES[arg]
        from_paper(config, *sizes)
        if arg == "g2":
            about.approximate += ("model.d_model", "model.num_layers", "model.num_heads")
    else:
        about.total_params = LAPTOP[arg]
        model.update(image_size=28, num_classes=10, num_layers=4, d_model=64, num_heads=2)
        model.ffn_hidden = (256,)
        # Not mirrored: all shoes point one way, and samples are compared with pictures as they are.
        data.update(source="fashion_mnist:default", image_size=28, batch_size=64)
        config.optim.update(learning_rate=1e-3, warmup_steps=100, ema_decay=0.999)
        config.train.update(steps=12_000, checkpoint_every=2000)
        config.log.every, config.eval.every = 100, 2000
    if arg in ("latents", "text"):
        data.update(source="builtin:emoji32", image_size=32)
    if arg == "latents":
        data.update(latents=True, image_tokenizer="builtin:kl")
        model.update(image_size=8, in_channels=8, patch_size=1)
    if arg == "text":
        data.update(format="pairs", sequence_length=24)
        config.objective.augment.flip = "allowed"
        model.update(image_size=32, text_length=24, num_classes=0)
        model.text.num_layers = 2
    about.active_params = about.total_params
    config.eval.metrics = ("denoising",)
    return config


def from_paper(config, width: int, layers: int, heads: int, patch: int) -> None:
    """Sizes and training of the authors' code, on latents of ImageNet."""
    model = config.model
    model.update(image_size=32, in_channels=4, num_classes=1000, patch_size=patch, dtype="bfloat16")
    model.update(d_model=width, num_layers=layers, num_heads=heads, ffn_hidden=(4 * width,))
    config.data.update(image_size=256, batch_size=256, latents=True, image_tokenizer="builtin:kl")
    config.optim.update(learning_rate=1e-4, warmup_steps=0, clip_norm=0.0, ema_decay=0.9999)
    config.train.update(steps=400_000, checkpoint_every=5000)
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.about.approximate = ("data.source", "data.image_tokenizer", "model.dtype")
