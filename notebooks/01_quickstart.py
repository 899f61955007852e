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
# # Quickstart: a Mixture-of-Transformers on pictures and names
#
# One decoder reads names and pictures of emoji in one sequence. Each modality has weights of its
# own; one self-attention sees both. This notebook trains it, measures it on emoji of concepts it
# has never seen, lets it draw, and compares it with a dense model of the same FLOPs.
#
# `TOY=1` in the environment makes every run a few steps long.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import moejax

TOY = os.environ.get("TOY") == "1"
STEPS = 4 if TOY else 150
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The experiment is a config
# Every field can be changed here, or on the command line as `--config.optim.learning_rate=1e-3`.

# %%
overrides = {"train.steps": STEPS, "log.every": max(1, STEPS // 30)}
if TOY:
    overrides |= {"data.batch_size": 8, "eval.batches": 1}
config = moejax.load_config("quickstart", overrides)
config.model

# %% [markdown]
# ## The data
# A record is a picture with a text. The frozen image tokenizer turns a picture into 64 codes of
# 1,000; below each picture is what the codes still hold of it.

# %%
from moejax.data.sources import open_source
from moejax.models.tokenizer import load_image_codec

records = open_source(config.data.source, "train")
codec = load_image_codec(config.data.image_tokenizer)
chosen = [records[i] for i in np.random.default_rng(0).choice(len(records), 8, replace=False)]
decoded = codec.decode(codec.encode(np.stack([record["image"] for record in chosen])))
figure, grid = plt.subplots(2, 8, figsize=(12, 3.4))
for column, record in enumerate(chosen):
    grid[0, column].imshow(record["image"])
    grid[0, column].set_title(record["text"][:18], fontsize=8)
    grid[1, column].imshow(decoded[column])
for axis in grid.flat:
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Train
# The same as `moejax train --config quickstart`. Run the cell again and it says that the run is
# finished; stop it and it goes on where it was.

# %%
values = moejax.train(config, folder / "mot")

# %%
import json

rows = [json.loads(line) for line in (folder / "mot" / "metrics.jsonl").open()]
rows = [row for row in rows if "train/loss" in row]
for name in ("text", "image"):
    plt.plot([row["step"] for row in rows], [row[f"train/loss/{name}"] for row in rows], label=name)
    plt.axhline(values[f"eval/{name}/unigram_loss"], linestyle=":", color="grey")
plt.xlabel("step")
plt.ylabel("nats per token (dotted: unigram)")
plt.legend()
plt.show()

# %% [markdown]
# ## Draw
# Names of held-out concepts, what the model draws for them, and below it the nearest picture of the
# training set with its distance (root mean square over pixels): what is copied shows at once.

# %%
from moejax.generate.api import load_sampler, sample_images
from moejax.generate.images import nearest_images
from moejax.generate.sampling import Sampling

sampler = load_sampler(folder / "mot")
held_out = open_source(config.data.source, "val")
captions = [held_out.text_at(i) for i in range(0, len(held_out), len(held_out) // 8)][:8]
drawn = sample_images(sampler, captions, sampling=Sampling(top_p=0.95, guidance=2.0))
known = np.stack([record["image"] for record in records])
nearest, distance = nearest_images(drawn, known)
figure, grid = plt.subplots(2, 8, figsize=(12, 3.6))
for column, caption in enumerate(captions):
    grid[0, column].imshow(drawn[column])
    grid[0, column].set_title(caption[:18], fontsize=8)
    grid[1, column].imshow(known[nearest[column]])
    grid[1, column].set_title(f"{distance[column]:.0f} / 255 away", fontsize=8)
for axis in grid.flat:
    axis.axis("off")
plt.show()

# %% [markdown]
# ## The dense model, at the same FLOPs
# One changed argument. On held-out concepts, nats per token, lower is better. One seed and a small
# model: the README says what a comparison needs.

# %%
dense = moejax.load_config("quickstart:dense", overrides)
dense_values = moejax.train(dense, folder / "dense")
for name in ("text", "image"):
    key = f"eval/{name}/loss"
    print(f"{name:6} MoT {values[key]:.3f}  dense {dense_values[key]:.3f}")
