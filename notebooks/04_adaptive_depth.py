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
# # Adaptive depth: tokens that skip blocks, and layers that are run again
#
# A mixture of depths and a mixture of recursions, trained on names and pictures of emoji: what
# fewer tokens cost, who runs what, what it costs that a decoder cannot see later tokens, and how
# full the caches are.
#
# `TOY=1` in the environment makes every run a few steps long. All that a config can say about depth
# is in [docs/depth.md](../docs/depth.md).

# %%
import dataclasses
import os
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import moejax

TOY = os.environ.get("TOY") == "1"
STEPS = 4 if TOY else 150
folder = Path(tempfile.mkdtemp())
common = {
    "train.steps": STEPS,
    "train.checkpoint_every": STEPS,
    "log.every": max(1, STEPS // 10),
    "eval.every": STEPS,
    "eval.batches": 1 if TOY else 8,
}
if TOY:
    common |= {"model.d_model": 32, "data.batch_size": 8}

# %% [markdown]
# ## Fewer tokens, fewer FLOPs
# `capacity` is the share of a row's tokens that run a block. The feed-forward layer shrinks with
# it, attention with its square. By formula, and counted from the traced program; the dense model of
# as many layers is 1.

# %%
from moejax.analysis.flops import counted_flops, flops_per_token

capacities = (0.125, 0.25, 0.5, 0.75, 1.0)


def relative_flops(name, spec, overrides):
    config = moejax.load_config(spec, common | overrides)
    dense = moejax.load_config("mod", common | {"model.block_pattern": ("untied",)})
    counted = counted_flops(config).forward.nominal / counted_flops(dense).forward.nominal
    formula = flops_per_token(config) / flops_per_token(dense)
    print(f"{name:16} {formula:.3f} by formula, {counted:.3f} counted")
    return formula


by_capacity = [
    relative_flops(f"capacity {c}", "mod", {"model.depth.capacity": c}) for c in capacities
]
plt.plot(capacities, by_capacity, marker="o")
plt.xlabel("share of the tokens that run every second block")
plt.ylabel("FLOPs, dense = 1")
plt.ylim(0, 1.1)
plt.show()

# %% [markdown]
# ## Training
# In training the best scores of a row win: later tokens matter. The evaluator `depth` measures the
# loss twice, with the rule that decoding follows and with the choices of training.

# %%
models = {
    "mod": ("mod", {}),
    "mod, predictor": ("mod:predictor", {}),
    "mor": ("mor", {}),
}
values = {}
for name, (spec, own) in models.items():
    config = moejax.load_config(spec, common | own | {"eval.metrics": ("likelihood", "depth")})
    values[name] = moejax.train(config, folder / name)

# %% [markdown]
# ## The price of causality
# Left: nats per held-out target. Right: how often the rule says what training would have chosen. A
# rule that always says "skip" agrees with 1 - capacity.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
at = np.arange(len(values))
for shift, key, label in ((-0.2, "loss", "as decoded"), (0.2, "loss_as_trained", "as trained")):
    left.bar(at + shift, [v[f"eval/depth/{key}"] for v in values.values()], 0.4, label=label)
right.bar(at, [v["eval/depth/agreement"] for v in values.values()], 0.4, label="the rule")
chosen = [v["eval/depth/chosen"] for v in values.values()]
right.plot(at, [max(c, 1 - c) for c in chosen], "k_", ms=40, label="always the same answer")
for axis, title in ((left, "nats per target"), (right, "agreement with training's choice")):
    axis.set_xticks(at, values)
    axis.set_title(title)
    axis.legend(loc="lower right")
plt.show()
for name, v in values.items():
    print(
        f"{name:15} as decoded {v['eval/depth/loss']:.4f}, as trained "
        f"{v['eval/depth/loss_as_trained']:.4f}, agreement {v['eval/depth/agreement']:.3f}"
    )

# %% [markdown]
# ## Who runs what
# The share of each modality's tokens in each block, then single words and pictures: what is faded
# skipped the block. `moejax eval --metrics depth` writes the same pictures, and `moejax report`
# shows them.

# %%
from moejax.train.evaluate import eval_plans, run_evaluators

for name in ("mod", "mor"):
    context = moejax.load(folder / name).eval_context(None, ["depth"])
    images = run_evaluators(context, eval_plans(context.config.eval)).images
    for label, image in images.items():
        plt.figure(figsize=(11, 11 * image.shape[0] / image.shape[1]))
        plt.imshow(image)
        plt.title(f"{name}, {label}")
        plt.axis("off")
        plt.show()

# %% [markdown]
# ## Choosing by hand
# The choice is a pure function of scores: the best half of the tokens of each row that compete, and
# then the few rows that a block is given. `room` is a number that the program knows before it runs.

# %%
from moejax.depth import choose, select

scores = jax.random.normal(jax.random.key(0), (2, 12))
competes = np.ones((2, 12), bool)
competes[1, 8:] = False
kept = choose(scores, competes, 0.5, "down")
selection = select(kept, room=6, scores_bt=scores)
print("kept", kept.astype(int), "places", selection.index_bc, sep="\n")

# %% [markdown]
# ## Caches of unequal length
# Each attention keeps the keys of the tokens that it has seen. After reading some held-out rows:
# the filled slots of each layer, or of each step of a layer that is run again.

# %%
from moejax.generate.cache import init_cache, write_rows


def filled_slots(name):
    run = moejax.load(folder / name)
    batch = {key: value[:4] for key, value in run.train_pipeline().batch(0).items()}
    rows, tokens = run.apply(batch).rows, (batch["segments"] > 0).sum(axis=1)
    cache = init_cache(run.model, run.params, 4, batch["tokens"].shape[1])
    cache = write_rows(cache, rows, tokens)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache.rows):
        if path[-1].key == "filled":
            label = "/".join(p.key for p in path if not p.key.endswith(("cache", "filled")))
            found[label] = np.asarray(leaf).reshape(-1, 4)
    return found, tokens


for name in ("mod", "mor"):
    found, tokens = filled_slots(name)
    labels = [f"{key} {i}" for key, value in found.items() for i in range(len(value))]
    slots = np.concatenate(list(found.values())) / tokens
    plt.figure(figsize=(8, 0.35 * len(labels) + 1))
    plt.barh(labels, slots.mean(axis=1), xerr=slots.std(axis=1))
    plt.gca().invert_yaxis()
    plt.xlabel("filled slots / tokens read (4 rows, mean and standard deviation)")
    plt.title(name)
    plt.tight_layout()
    plt.show()

# %% [markdown]
# ## Change one line
# The rule's threshold is a field like any other, and needs no training: a lower one lets more
# tokens run. The loss as decoded against the share of tokens that run.

# %%
run = moejax.load(folder / "mod")
thresholds = (0.05, 0.2, 0.5, 0.8, 0.95)
points = []
for threshold in thresholds:
    depth = dataclasses.replace(run.config.model.depth, threshold=threshold)
    model = run.model.clone(config=dataclasses.replace(run.config.model, depth=depth))
    context = dataclasses.replace(run.eval_context(None, ["depth"]), model=model)
    points.append(run_evaluators(context, eval_plans(context.config.eval)).values)
plt.plot([p["depth/ran"] for p in points], [p["depth/loss"] for p in points], marker="o")
for threshold, p in zip(thresholds, points, strict=True):
    plt.annotate(f"  {threshold}", (p["depth/ran"], p["depth/loss"]))
plt.xlabel("share of tokens that ran a block that can be skipped")
plt.ylabel("nats per target, as decoded")
plt.show()
