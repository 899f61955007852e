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
# # Routing: which token goes to which expert
#
# Three small decoders with eight experts in every other layer, trained on names and pictures of
# emoji: softmax routing with a balance loss, sigmoid routing whose biases a controller moves, and a
# router that is written here. What their experts were given, over time, by modality, by token.
#
# `TOY=1` in the environment makes every run a few steps long. What a config can say about routing
# is in [docs/routing.md](../docs/routing.md).

# %%
import json
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import moejax

TOY = os.environ.get("TOY") == "1"
STEPS = 4 if TOY else 120
folder = Path(tempfile.mkdtemp())
common = {
    "model.block_pattern": ("dense", "moe"),
    "model.moe.num_experts": 8,
    "model.moe.top_k": 2,
    "model.moe.hidden": 192,
    "train.steps": STEPS,
    "train.checkpoint_every": STEPS // 2,
    "log.every": max(1, STEPS // 30),
    # The evaluator "routing" counts choices, and keeps those of a few rows.
    "eval.metrics": ("likelihood", "routing"),
    "eval.every": STEPS // 2,
    "eval.batches": 4,
}
if TOY:
    tiny = {"model.num_layers": 2, "model.d_model": 32, "model.moe.hidden": 16}
    common |= {**tiny, "data.batch_size": 8, "eval.batches": 1}

# %% [markdown]
# ## Two routers
# `moejax list routers`, `list losses` and `list scores` show what there is, with all options.

# %%
routers = {
    "top_k": {"model.moe.losses": ({"name": "switch", "coefficient": 0.01},)},
    "sigmoid": {
        "model.moe.router.options.normalise": "sigmoid",
        "model.moe.router.options.renormalise": True,
        # A bias for each expert, up where it has too few tokens and down where too many.
        "model.moe.balance.name": "sign",
        "model.moe.balance.rate": 0.003,
    },
}
values = {}
for name, own in routers.items():
    config = moejax.load_config("quickstart:dense", {**common, **own})
    values[name] = moejax.train(config, folder / name)

# %% [markdown]
# ## Balance over time
# `max_violation` is the largest load over the mean, less 1; metrics.jsonl has it at each log point.


# %%
def rows_of(name, file="metrics"):
    return [json.loads(line) for line in (folder / name / f"{file}.jsonl").open()]


def plot_balance(names):
    for name in names:
        rows = [row for row in rows_of(name) if "train/router/max_violation" in row]
        violation = [row["train/router/max_violation"] for row in rows]
        plt.plot([row["step"] for row in rows], violation, label=name)
    plt.xlabel("step")
    plt.ylabel("max violation, mean over layers")
    plt.legend()
    plt.show()
    for name in names:
        losses = [f"{kind} {values[name][f'eval/{kind}/loss']:.3f}" for kind in ("text", "image")]
        print(f"{name:8} {', '.join(losses)} nats per held-out token")


plot_balance(routers)

# %% [markdown]
# ## Load over time
# routing.jsonl has, for each layer, the choices of each modality for each expert. Here as shares,
# one column for each log point.


# %%
def plot_load(name):
    rows = rows_of(name, "routing")
    layers = [layer["layer"] for layer in rows[0]["layers"]]
    figure, grid = plt.subplots(1, len(layers), figsize=(6 * len(layers), 2.6), squeeze=False)
    for i, axis in enumerate(grid[0]):
        load = np.array([np.sum(row["layers"][i]["load"], axis=0) for row in rows], float)
        axis.imshow((load / load.sum(axis=1, keepdims=True)).T, aspect="auto", cmap="Blues", vmin=0)
        axis.set(title=f"{name}, layer {layers[i]}", xlabel="log point", ylabel="expert")
    plt.show()


for name in routers:
    plot_load(name)

# %% [markdown]
# ## Experts by modality
# The record of the evaluator: what the held-out tokens of each modality chose.

# %%
from moejax.analysis.routing_record import read_records


def last_record(name):
    return read_records(folder / name, "val")[STEPS]


def plot_modalities(name):
    record = last_record(name)
    figure, grid = plt.subplots(1, 2, figsize=(11, 2.2))
    for m, axis in enumerate(grid):
        axis.imshow(record.load(m), aspect="auto", cmap="Blues", vmin=0)
        axis.set_yticks(range(len(record.layers)), record.layer_names)
        axis.set(title=f"{name}, {record.modalities[m]}", xlabel="expert")
    plt.show()


for name in routers:
    plot_modalities(name)

# %% [markdown]
# ## Does it follow the token or its context?
# The entropy of the expert given the token's id, beside the same for ids dealt anew among the
# tokens of a modality: few tokens of each id look sure by chance.

# %%
for name in routers:
    record = last_record(name)
    for i, layer in enumerate(record.layer_names):
        print(
            f"{name:8} {layer}: H(expert) {record.expert_entropy[i]:.2f}, "
            f"given modality {record.modality_entropy[i]:.2f}, "
            f"given token id {record.token_entropy[i]:.2f} "
            f"(shuffled {record.shuffled_token_entropy[i]:.2f}), of at most {np.log(8):.2f}"
        )

# %% [markdown]
# ## Tokens and patches by expert
# Names of held-out emoji, and below them their pictures (64 tokens each), coloured by the expert of
# the largest weight. `moejax report` has the same, with the values under the pointer.

# %%
from moejax.analysis.heatmaps import expert_color, ink


def plot_tokens(name, layer=-1):
    record = last_record(name)
    figure, axis = plt.subplots(figsize=(11, 0.35 * len(record.row_pieces)))
    for row, pieces in enumerate(record.row_pieces):
        x = 0.0
        for place in np.flatnonzero((pieces != "") & record.row_valid[row])[:24]:
            color = expert_color(record.row_experts[layer, row, place, 0])
            text = axis.text(x, -row, pieces[place], color=ink(color), backgroundcolor=color)
            x += text.get_window_extent().width / 850 + 0.012
    axis.set(title=f"{name}, {record.layer_names[layer]}", ylim=(-len(record.row_pieces), 1))
    axis.axis("off")
    plt.show()


def plot_patches(name):
    record = last_record(name)
    shown = [("picture", None), *zip(record.layer_names, record.row_experts, strict=True)]
    size = (1.7 * len(record.places), 1.8 * len(shown))
    figure, grid = plt.subplots(len(shown), len(record.places), figsize=size, squeeze=False)
    for axes, (label, experts) in zip(grid, shown, strict=True):
        for axis, picture, (row, start) in zip(axes, record.pictures, record.places, strict=True):
            axis.imshow(picture, extent=(0, 8, 8, 0))
            axis.axis("off")
            if experts is not None:
                ids = experts[row, start : start + 64, 0]
                colors = [
                    [int(expert_color(e)[i : i + 2], 16) / 255 for i in (1, 3, 5)] for e in ids
                ]
                axis.imshow(np.reshape(colors, (8, 8, 3)), extent=(0, 8, 8, 0), alpha=0.75)
        axes[0].set_title(f"{name}, {label}", fontsize=8, loc="left")
    plt.show()


for name in routers:
    plot_tokens(name)
    plot_patches(name)

# %% [markdown]
# ## A router of one's own
# One function and one line that registers it: a second expert only for tokens that are not sure of
# their first one. Its keyword arguments are the options of `model.moe.router.options`.

# %%
import jax.numpy as jnp

from moejax.routing import RoutingPlan, router
from moejax.routing.normalise import softmax
from moejax.routing.select import largest, pick


@router("unsure", choices=lambda experts, options: 2)
def unsure(inputs, *, sure: float = 0.5):
    """One expert, and a second one where the first has a probability below ``sure``."""
    may = inputs.may_choose()
    probs = softmax(inputs.logits, may)
    ids = largest(probs, may, 2)
    second = pick(probs, ids)[..., :1] < sure
    wanted = jnp.concatenate([jnp.ones_like(second), second], axis=-1)
    ids = jnp.where(wanted, ids, inputs.num_experts)
    return RoutingPlan(expert_ids=ids, weights=pick(probs, ids), probs=probs)


# %%
own = {
    "model.moe.router.name": "unsure",
    "model.moe.router.options.sure": 0.2,
    "model.moe.losses": ({"name": "switch", "coefficient": 0.01},),
}
config = moejax.load_config("quickstart:dense", {**common, **own})
values["unsure"] = moejax.train(config, folder / "unsure")
plot_balance([*routers, "unsure"])
plot_patches("unsure")
print(f"experts of a token: {values['unsure']['eval/routing/experts_per_token']:.2f}")

# %% [markdown]
# ## When is the routing settled?
# The share of held-out tokens whose first expert is the same at half time and at the end.

# %%
from moejax.train.routing import routing_agreement

for name in values:
    last, half = moejax.load(folder / name), moejax.load(folder / name, STEPS // 2)
    found = routing_agreement(last.eval_context(), half.params, last.params)
    print(
        f"{name:8} same first expert {found['first'].round(2)}, overlap {found['overlap'].round(2)}"
    )
