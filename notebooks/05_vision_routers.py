# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Vision routers: which expert takes which patch
#
# Seven small vision transformers of equal FLOPs, those of the config `vision_routers`: dense, and
# with each of the six routers that [arXiv 2401.15969](https://arxiv.org/abs/2401.15969) compares.
# Patches choose experts (`softmax_token`, `sinkhorn_token`), experts choose patches
# (`softmax_expert`, `sinkhorn_expert`, `sparse_expert`), or experts see mixtures of patches
# (`soft`). How often they find the class, what a linear classifier finds in their features, how
# they bear noise, and what their experts look at.
#
# Fashion-MNIST (`apt-get install dataset-fashion-mnist`), or the built-in emoji by their ten
# categories where it is not installed. `TOY=1` in the environment makes every run a few steps long.
# What a config can say about vision models is in [docs/vision.md](../docs/vision.md).

# %%
import json
import os
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import moejax
from moejax.data.fashion_mnist import PACKAGE_FOLDER

TOY = os.environ.get("TOY") == "1"
STEPS = 4 if TOY else 400
FASHION = PACKAGE_FOLDER.is_dir()
folder = Path(tempfile.mkdtemp())
common = {
    "train.steps": STEPS,
    "train.checkpoint_every": STEPS,
    "log.every": max(1, STEPS // 10),
    "eval.every": max(1, STEPS // 4),
    # The last two after the last step only.
    "eval.metrics": ("accuracy", "linear_probe@val/0", "robustness@val/0"),
    "eval.batches": 8,
    "eval.probe.pictures": 2000,
}
if not FASHION:
    common |= {"data.source": "builtin:emoji32", "data.image_size": 32, "model.image_size": 32}
    common |= {"objective.augment.flip": "allowed", "objective.augment.crop_padding": 2}
if TOY:
    tiny = {"model.num_layers": 2, "model.d_model": 16, "model.ffn_hidden": (16,)}
    common |= {**tiny, "data.batch_size": 8, "eval.batches": 1, "eval.probe.pictures": 64}
    common |= {
        "eval.every": STEPS,
        "eval.robustness.noise": (16.0,),
        "eval.robustness.blur": (1.0,),
    }

# %% [markdown]
# ## Equal FLOPs
# An expert is as wide as the dense layer, and a patch has one, or one on average. Slots are fewer
# than patches (40 for 49): mixing into slots and out of them costs the rest. By formula, and
# counted from the traced program.

# %%
from moejax.analysis.flops import counted_flops, flops_per_token

routers = (
    "softmax_token",
    "sinkhorn_token",
    "softmax_expert",
    "sinkhorn_expert",
    "sparse_expert",
    "soft",
)
# 48 slots for the 64 patches of an emoji.
own = {} if FASHION else {"soft": {"model.moe.router.options.slots": 6}}
configs = {
    name: moejax.load_config(f"vision_routers:{name}", common | own.get(name, {}))
    for name in ("dense", *routers)
}
for name, config in configs.items():
    formula, dense = flops_per_token(config), flops_per_token(configs["dense"])
    counted = counted_flops(config).forward.nominal
    print(f"{name:15} {formula / dense:.3f} of dense by formula, {counted:.3e} FLOPs a picture")

# %% [markdown]
# ## Training
# Held-out accuracy in the course of it. One seed of a short run: a difference of a percent is
# chance. `moejax compare` makes comparisons that can be believed.

# %%
values = {}
for name, config in configs.items():
    values[name] = moejax.train(config, folder / name)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
    curve = [
        (row["step"], row["eval/image/accuracy"]) for row in rows if "eval/image/accuracy" in row
    ]
    plt.plot(*zip(*curve, strict=True), marker="o", label=name)
plt.axhline(
    values["dense"]["eval/image/majority_accuracy"], ls="--", color="grey", label="majority"
)
plt.xlabel("step")
plt.ylabel("accuracy, val")
plt.legend()
plt.show()

# %% [markdown]
# ## What the features are worth
# A ridge regression on the pooled features: with all labels looked at, and with 1, 5 and 10 a class
# (mean and standard deviation over five draws). Then accuracy under noise and blur.

# %%
shots = (1, 5, 10)
for name, v in values.items():
    few = ", ".join(
        f"{k} shot {v[f'eval/probe/{k}_shot']:.3f} +- {v[f'eval/probe/{k}_shot_spread']:.3f}"
        for k in shots
    )
    found, probed = v["eval/image/accuracy"], v["eval/probe/accuracy"]
    print(f"{name:15} accuracy {found:.3f}, probe {probed:.3f}, {few}")

figure, panels = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
levels = configs["dense"].eval.robustness
for panel, kind, strengths in (
    (panels[0], "noise", levels.noise),
    (panels[1], "blur", levels.blur),
):
    for name, v in values.items():
        found = [v[f"eval/robustness/{kind}_{s:g}"] for s in strengths]
        panel.plot([0, *strengths], [v["eval/robustness/clean"], *found], marker="o", label=name)
    panel.set_xlabel(kind)
panels[0].set_ylabel("accuracy, val")
panels[0].legend()
plt.show()

# %% [markdown]
# ## Which expert takes which patch
# With `record=True` a model says what it decided for each token. The colour of a patch is the
# expert that it has with the largest weight; in soft routing, the expert whose slots it mixes most
# of; grey: no expert.

# %%
from moejax.objectives.routing import routings


def chosen(name, images):
    """The expert of each patch of the last layer of experts, [b, p]; -1 for none."""
    run = moejax.load(folder / name)
    forward = jax.jit(lambda p, x: run.model.apply({"params": p}, {"images": x}, record=True).aux)
    aux = forward(run.params, images)
    path, _ = list(routings(aux))[-1]
    for part in path.split("/"):
        aux = aux[part]
    ids, weights = (np.asarray(aux[key])[-1] for key in ("expert_ids", "weights"))
    weights = np.where(ids < configs[name].model.moe.num_experts, weights, -1.0)
    best = weights.argmax(axis=-1)[..., None]
    expert = np.take_along_axis(ids, best, axis=-1)[..., 0]
    return np.where(np.take_along_axis(weights, best, axis=-1)[..., 0] > 0, expert, -1)


run = moejax.load(folder / "dense")
context = run.eval_context("val", ["accuracy"])
source = context.pipeline.source
spread = np.linspace(0, len(source) - 1, 64 if TOY else 512).astype(int)
images = np.stack([source[int(i)]["image"] for i in spread])
labels = np.asarray([source[int(i)]["label"] for i in spread])
experts = {name: chosen(name, images) for name in routers}

colors = plt.get_cmap("tab10")(np.arange(8))[:, :3]
grid, shown = run.config.model.grid, [int(np.flatnonzero(labels == c)[0]) for c in set(labels)]
figure, panels = plt.subplots(len(routers) + 1, len(shown), figsize=(1.3 * len(shown), 9.8))
for column, i in enumerate(shown):
    panels[0, column].imshow(images[i])
    panels[0, column].set_title(source.categories[labels[i]], fontsize=7)
    for row, name in enumerate(routers, 1):
        ids = experts[name][i].reshape(grid)
        shade = np.where(ids[..., None] < 0, 0.8, colors[ids])
        tall = images[i].shape[0] // grid[0]
        shade = np.repeat(np.repeat(shade, tall, axis=0), tall, axis=1)
        panels[row, column].imshow(0.35 * images[i] / 255 + 0.65 * shade)
for panel in panels.flat:
    panel.set_xticks([])
    panel.set_yticks([])
for row, name in enumerate(("picture", *routers)):
    panels[row, 0].set_ylabel(name, fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Which expert takes which class
# The share of a class's patches that have an expert as their first. Rows of one colour pattern mean
# that experts go by what a patch looks like, whatever the picture shows.

# %%
classes = len(source.categories)
figure, panels = plt.subplots(2, 3, figsize=(12, 6.8), sharex=True, sharey=True)
for panel, name in zip(panels.flat, routers, strict=True):
    share = np.zeros((classes, 8))
    for label in set(labels):
        own = experts[name][labels == label]
        share[label] = np.bincount(own[own >= 0], minlength=8) / own.size
    panel.imshow(share, vmin=0, vmax=share.max(), aspect="auto")
    panel.set_title(name)
for panel in panels[1]:
    panel.set_xlabel("expert")
panels[0, 0].set_yticks(range(classes), source.categories, fontsize=7)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Pictures of several sizes in a row
# `data.image_sizes` and `data.max_patches` put pictures of different size into one row, in which
# each sees itself alone. Which sizes share a row is decided by first fit:

# %%
from moejax.data.packing import first_fit

lengths = np.resize([64, 16, 36], 12)
for bin in first_fit(lengths, 100):
    print([int(lengths[i]) for i in bin], "of 100 patches")

# %% [markdown]
# ## Change one line
# Any other router of `moejax list routers` will do: name it with its options in `own` above.
