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
# # Comparing methods at equal FLOPs
#
# What share of the dense model's training FLOPs does a method need to reach the dense model's loss?
# Four arms on names and pictures of emoji: dense, two layers of experts, and a dense decoder of
# half the layers, each at its own best learning rate, with paired seeds. `moejax compare` is the
# same from the command line.
#
# `TOY=1` in the environment makes every run a few steps long. How a comparison is made, and what
# its figures mean, is in [docs/compare.md](../docs/compare.md).

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, Markdown

import moejax
from moejax.analysis.compare.matching import Curve, loss_difference, verdict

TOY = os.environ.get("TOY") == "1"
folder = Path(tempfile.mkdtemp())
options = {"seeds": 3}
budget = "flops=6e11"
if TOY:
    tiny = ["model.num_layers=2", "model.d_model=32", "model.num_heads=2", "model.moe.hidden=16"]
    small = ["data.batch_size=8", "eval.batches=1"]
    options = {"seeds": 2, "rates": (3e-3,), "evaluations": 2, "overrides": [*tiny, *small]}
    budget = "steps=4"

# %% [markdown]
# ## The arms
# A name and a config, or a config with fields changed. The first is the baseline. All arms see the
# same batches in the same order; a budget buys fewer steps of a dearer arm.

# %%
experts = {
    "model.block_pattern": ("dense", "moe"),
    "model.moe.num_experts": 8,
    "model.moe.top_k": 1,
    "model.moe.losses": ({"name": "switch", "coefficient": 0.01},),
}
arms = {
    "dense": "quickstart:dense",
    "MoT": "quickstart",
    "switch": ("quickstart:dense", {**experts, "model.moe.hidden": 16 if TOY else 384}),
    "half": ("quickstart:dense", {"model.num_layers": 1 if TOY else 2}),
}
found = moejax.compare(arms, budget, folder / "comparison", **options)
Markdown(found.table().replace("![loss against FLOPs](comparison.png)", ""))

# %% [markdown]
# `> 1` says that an arm did not reach the baseline's loss within the budget: its ratio is not
# extrapolated. The column beside it asks the other way round, and has a number then.

# %%
Image(folder / "comparison" / "comparison.png")

# %% [markdown]
# ## One's own figures
# The curves of every seed, here as what each seed of an arm has over the baseline's same seed.

# %%
dense, *others = found.results
figure, panels = plt.subplots(1, 2, figsize=(9, 3))
for panel, modality in zip(panels, found.plan.modalities, strict=True):
    for result in others:
        curves = result.flops_curves(modality)
        for curve, base in zip(curves, dense.flops_curves(modality), strict=True):
            targets = [target for target in base.losses if curve.to_reach(target)]
            saved = [curve.to_reach(target) / base.to_reach(target) for target in targets]
            color = f"C{others.index(result)}"
            panel.plot(targets, saved, ".-", color=color, alpha=0.6)
        panel.plot([], [], color=color, label=result.arm.name)
    panel.axhline(1, color="gray", linestyle="--")
    panel.invert_xaxis()
    panel.set(title=modality, xlabel="held-out loss (nats)", ylabel="FLOPs over dense")
panels[0].legend()
plt.show()

# %% [markdown]
# ## How sure can one be?
# Curves of a known law with the noise of a seed: arms that are equal should be told apart in about
# 5 of 100 comparisons; one that needs half the FLOPs nearly always.

# %%
rng = np.random.default_rng(0)
spent = tuple(1e9 * (i + 1) for i in range(8))


def curve(scale, seed_effect):
    losses = 2 + 3 * (np.array(spent) / scale / 1e9) ** -0.3 + seed_effect
    return Curve(spent, tuple(losses + rng.normal(0, 0.01) + rng.normal(0, 0.003, len(spent))))


def verdicts(scale, comparisons, seeds=3):
    answers = []
    for _ in range(comparisons):
        effects = rng.normal(0, 0.1, seeds)
        arm = [curve(scale, effect) for effect in effects]
        base = [curve(1.0, effect) for effect in effects]
        answers.append(verdict(loss_difference(arm, base)))
    return answers


scales = (0.5, 0.8, 1.0, 1.25, 2.0)
answers = {scale: verdicts(scale, 20 if TOY else 200) for scale in scales}
kinds = ("better", "not told apart", "worse")
bottom = np.zeros(len(scales))
for kind in kinds:
    share = np.array([np.mean([answer == kind for answer in answers[s]]) for s in scales])
    plt.bar([str(scale) for scale in scales], share, bottom=bottom, label=kind)
    bottom += share
plt.xlabel("FLOPs that the arm really needs, over the baseline's")
plt.ylabel("share of comparisons with three seeds")
plt.legend()
plt.show()
