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
# # Diffusion transformers with experts: what is drawn, and which expert draws it
#
# Three small diffusion transformers of equal FLOPs draw clothes: a dense one, DiT-MoE, whose
# patches choose two of eight experts beside a shared one, and ProMoE, where a patch goes to the
# nearest of twelve prototypes. How they learn, what they draw on the way from noise, what guidance
# does, and how experts go by noise level, place and class.
#
# Fashion-MNIST (`apt-get install dataset-fashion-mnist`), or the built-in emoji by their ten
# categories where it is not installed. `TOY=1` in the environment makes every run a few steps long.
# Processes, samplers and measures of quality are in [docs/diffusion.md](../docs/diffusion.md), the
# network in [docs/dit.md](../docs/dit.md).

# %%
import json
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import moejax
from moejax.data.fashion_mnist import PACKAGE_FOLDER

TOY = os.environ.get("TOY") == "1"
STEPS = 4 if TOY else 1500
folder = Path(tempfile.mkdtemp())
common = {
    "train.steps": STEPS,
    "train.checkpoint_every": STEPS,
    "optim.learning_rate": 2e-3,
    "log.every": max(1, STEPS // 10),
    "eval.every": max(1, STEPS // 5),
    "eval.batches": 8,
}
if not PACKAGE_FOLDER.is_dir():
    common |= {"data.source": "builtin:emoji32", "data.image_size": 32, "model.image_size": 32}
width = 64
if TOY:
    width = 16
    common |= {
        "model.num_layers": 2,
        "model.d_model": width,
        "data.batch_size": 8,
        "eval.batches": 1,
    }

# %% [markdown]
# ## Equal FLOPs
# All three are rectified flow: a picture and noise are mixed, `(1 - t) x0 + t eps`, and the network
# says which way the noise lies. Their experts are as wide as lets a patch cost what it does in the
# dense model. A noise level and a class are told to every block by shifts, scales and gates.

# %%
from moejax.analysis.flops import flops_per_token

flow = {"objective.direction": "to_noise", "objective.times.distribution": "logit_normal"}
models = {
    "dense": ("sit", {**flow, "model.ffn_hidden": (4 * width,)}),
    "DiT-MoE": (
        "dit_moe",
        {"model.moe.hidden": 68 * width // 64, "model.moe.shared_hidden": 34 * width // 64},
    ),
    "ProMoE": (
        "promoe",
        {
            "model.ffn_hidden": (4 * width,),
            "model.moe.hidden": 2 * width,
            "model.moe.shared_hidden": 2 * width,
        },
    ),
}
configs = {name: moejax.load_config(base, common | own) for name, (base, own) in models.items()}
for name, config in configs.items():
    ratio = flops_per_token(config) / flops_per_token(configs["dense"])
    print(f"{name:8} {ratio:.3f} of the FLOPs of dense")

# %% [markdown]
# ## Training
# The held-out error of the velocity. One seed of a short run: a small difference is chance.
# [experiments/dit_moe](../experiments/dit_moe/README.md) is a comparison with three seeds.

# %%
for name, config in configs.items():
    moejax.train(config, folder / name)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
    curve = [(row["step"], row["eval/image/loss"]) for row in rows if "eval/image/loss" in row]
    plt.plot(*zip(*curve, strict=True), marker="o", label=name)
plt.xlabel("step")
plt.ylabel("squared error of the velocity, val")
plt.legend()
plt.show()

# %% [markdown]
# ## Drawing
# The same noise and classes for all three, 25 steps, guidance 1.5: what is said of a class counts
# one and a half times. `moejax list samplers` names the others.

# %%
import dataclasses

from moejax.generate.denoiser import Drawing, draw_pictures, load_denoiser

drawing = Drawing(sampler="dpmpp_2m", steps=4 if TOY else 25, guidance=1.5)
samplers = {
    name: dataclasses.replace(load_denoiser(folder / name), drawing=drawing) for name in models
}
run = moejax.load(folder / "DiT-MoE")
categories = run.eval_context("val", ["denoising"]).pipeline.source.categories
classes = range(len(categories))


def show(rows, titles, labels, wide=1.0):
    """A grid of pictures: a row for each label, a column for each title."""
    figure, panels = plt.subplots(
        len(rows), len(titles), figsize=(wide * len(titles), wide * len(rows)), squeeze=False
    )
    for row, label, pictures in zip(panels, labels, rows, strict=True):
        row[0].set_ylabel(label, fontsize=8)
        for panel, picture in zip(row, pictures, strict=True):
            panel.imshow(picture)
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title, fontsize=7)
    for panel in panels.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    plt.tight_layout()
    plt.show()


drawn = {name: draw_pictures(sampler, list(classes), seed=0) for name, sampler in samplers.items()}
show([found.pictures for found in drawn.values()], categories, drawn)

# %% [markdown]
# ## On the way from noise
# What the network has in mind after some of the steps: first the mean of all that is possible, then
# shapes, then seams.

# %%
keep = tuple(np.linspace(0, drawing.steps - 1, min(8, drawing.steps)).round().astype(int).tolist())
strips = {
    name: draw_pictures(sampler, [min(7, len(categories) - 1)], seed=1, keep=keep)
    for name, sampler in samplers.items()
}
times = next(iter(strips.values())).times
show([found.kept[:, 0] for found in strips.values()], [f"t = {t:.2f}" for t in times], strips)

# %% [markdown]
# ## Guidance
# The same noise with more and more weight on the class: cleaner, and more alike.

# %%
weights = [0.0, 1.0, 2.0, 4.0, 8.0]
shown = [label for label in (0, 5, 8) if label < len(categories)]
conditions = [label for label in shown for _ in weights]
swept = draw_pictures(
    samplers["DiT-MoE"],
    conditions,
    seed=2,
    row_ids=[0] * len(conditions),
    guidance=weights * len(shown),
).pictures.reshape(len(shown), len(weights), *drawn["dense"].pictures.shape[1:])
show(swept, [f"w = {w:g}" for w in weights], [categories[label] for label in shown])

# %% [markdown]
# ## Experts by noise level, place and class
# The evaluator `routing` asks the model about held-out pictures at eight noise levels. A column is
# an expert of the last layer; a row is a noise level, or a class. Rows of one colour pattern mean
# that experts do not go by it. ProMoE's last expert, for pictures of which nothing is said, has
# none of these.

# %%
from moejax.analysis.routing_record import RoutingRecord
from moejax.train.evaluate import eval_plans, run_evaluators

sparse = [name for name in models if name != "dense"]
figure, panels = plt.subplots(2, len(sparse), figsize=(5 * len(sparse), 6), squeeze=False)
places = {}
for column, name in enumerate(sparse):
    context = moejax.load(folder / name).eval_context("val", ["routing"])
    result = run_evaluators(context, eval_plans(context.config.eval))
    record = RoutingRecord(**result.arrays["val/routing"])
    for panel, counts, labels in (
        (panels[0, column], record.by_time[-1], [f"t = {t:.2f}" for t in record.times]),
        (panels[1, column], record.by_class[-1], list(record.classes)),
    ):
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        panel.imshow(share, vmin=0, aspect="auto")
        panel.set_yticks(range(len(labels)), labels, fontsize=7)
        panel.set_xlabel("expert")
    panels[0, column].set_title(name)
    by_patch = record.by_patch[-1] / np.maximum(record.by_patch[-1].sum(axis=1, keepdims=True), 1)
    places[name] = by_patch.T.reshape(-1, *record.grid)
    entropy = result.values["routing/time_entropy"]
    even = np.log((record.chosen[-1].sum(axis=0) > 0).sum())
    print(
        f"{name:8} entropy of experts given the noise level: {entropy:.3f} nats, even: {even:.3f}"
    )
plt.tight_layout()
plt.show()

# %% [markdown]
# The same of places: bright where an expert takes most of the patches.

# %%
count = 8
figure, panels = plt.subplots(len(sparse), count, figsize=(count, 1.3 * len(sparse)), squeeze=False)
for row, name in zip(panels, sparse, strict=True):
    row[0].set_ylabel(name, fontsize=8)
    for number, panel in enumerate(row):
        panel.imshow(places[name][number], vmin=0, vmax=places[name].max())
        panel.set_title(f"expert {number}", fontsize=7)
        panel.set_xticks([])
        panel.set_yticks([])
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Change one line
# Experts by the noise alone (MoDE): add `"model.moe.score.input": "noise"` to DiT-MoE above, and
# every picture of a noise level has the same experts; or put `("ec_dit", {...})` beside it, where
# experts choose patches. `moejax eval --workdir RUN --metrics fidelity` measures what is drawn.
