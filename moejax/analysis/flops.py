"""FLOPs per token or picture: from the config alone, and counted from the program that it makes.

Conventions: a multiply-add is two; every matmul that a token takes part in counts once, those of
other modalities' towers not at all; logits count, embedding lookups, norms and softmax do not; a
backward is two forwards. Attention counts the whole square that the program multiplies (as PaLM
does, arXiv 2204.02311 appendix B); its causal half, another convention, is given beside it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from moejax.analysis.experts import expert_rows, film_products, router_products, soft_slots
from moejax.analysis.jaxpr_flops import count_flops
from moejax.analysis.params import abstract_batch, abstract_params
from moejax.config import Config, Registry
from moejax.config.schema import (
    AutoencoderConfig,
    DecoderConfig,
    DiTConfig,
    PairConfig,
    TrunkConfig,
    TwoTowersConfig,
    ViTConfig,
)
from moejax.config.towers import Tower
from moejax.config.trunk import AROUND_OTHERS
from moejax.models import build_model
from moejax.models.autoencoder import CHANNELS
from moejax.nn.depth import together
from moejax.nn.depth import training_room as depth_room
from moejax.nn.modulation import TIME_FEATURES
from moejax.nn.patch_adapter import TIME_FREQUENCIES
from moejax.nn.recursive import training_room as step_room
from moejax.objectives import build_objective
from moejax.ops.pictures import max_pictures
from pallas_kernels.costs import Cost

BACKWARD_AND_FORWARD = 3


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token: matmuls with weights, with keys and values, and logits.

    ``detached`` are those of ``weights`` whose input takes no gradient.
    """

    weights: float
    attention: float
    logits: float
    detached: float = 0.0

    @property
    def forward(self) -> float:
        return self.weights + self.attention + self.logits

    @property
    def causal(self) -> float:
        """Forward FLOPs when attention counts only what a causal mask lets through."""
        return self.weights + self.attention / 2 + self.logits

    @property
    def training(self) -> float:
        """Forward and backward, nothing computed twice."""
        return BACKWARD_AND_FORWARD * self.forward - self.detached

    def __add__(self, other: "TokenFlops") -> "TokenFlops":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return TokenFlops(*(a + b for a, b in pairs))

    def scaled(self, factor: float) -> "TokenFlops":
        return TokenFlops(*(factor * value for value in dataclasses.astuple(self)))


# model name -> function(config) -> {modality: TokenFlops}, or None if it cannot tell
MODEL_FLOPS: Registry[Callable[[Config], dict[str, TokenFlops] | None]] = Registry("formula")
# kind of block -> function(config.model, modality index, sequence length) -> TokenFlops
BLOCK_FLOPS: Registry[Callable[[TrunkConfig, int, int], TokenFlops]] = Registry("formula")


def flops_by_modality(config: Config) -> dict[str, TokenFlops] | None:
    """``{modality: TokenFlops}``, or None where no formula is registered for the model."""
    if config.model.name not in MODEL_FLOPS:
        return None
    return MODEL_FLOPS.get(config.model.name)(config)


def token_flops(config: Config) -> TokenFlops | None:
    """The mean over modalities, each counted alike; None where no formula is registered."""
    by_modality = flops_by_modality(config)
    if by_modality is None:
        return None
    total = sum(by_modality.values(), TokenFlops(0.0, 0.0, 0.0))
    return total.scaled(1 / len(by_modality))


def flops_per_token(config: Config) -> float:
    """Forward FLOPs of one token (training: three times that); 0 if no formula is known."""
    flops = token_flops(config)
    return flops.forward if flops is not None else 0.0


@dataclasses.dataclass(frozen=True)
class ProgramFlops:
    """FLOPs of one position of the batch, counted from the jaxprs of the model and its gradient.

    ``training`` counts what is computed again in the backward (``model.remat``).
    """

    forward: Cost
    training: Cost


def counted_flops(config: Config) -> ProgramFlops:
    """FLOPs per token (per picture for ``data.format="images"``), by tracing one microbatch."""
    model, objective = build_model(config), build_objective(config)
    params, batch = abstract_params(model, config), abstract_batch(config)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params: Any, batch: dict, key: jax.Array):
        batch = objective.prepare(batch, key)
        outputs = model.apply({"params": params}, batch, train=True, rngs={"dropout": key})
        return objective(outputs, batch, key).total()

    positions = batch["weights"].size
    per_position = lambda cost: Cost(cost.nominal / positions, cost.visited / positions)
    return ProgramFlops(
        forward=per_position(count_flops(loss, params, batch, key)),
        training=per_position(count_flops(jax.grad(loss), params, batch, key)),
    )


@MODEL_FLOPS.register("decoder")
def decoder_flops(config: Config) -> dict[str, TokenFlops] | None:
    """Blocks and logits; None if a kind of block has no formula.

    Pictures as latents have no logits, but an adapter into and out of the model's width, which the
    program runs for every position.
    """
    model, length = config.model, config.data.sequence_length
    kinds = [model.for_block(kind) for kind in model.block_kinds()]
    continuous = model.latents.channels > 0
    if not _has_formula(kinds):
        return None
    rows = config.data.batch_size // config.optim.accumulation_steps
    kinds = [(kind, _of_batch(own, rows)) for kind, own in kinds]
    logits = TokenFlops(0.0, 0.0, 2.0 * model.d_model * model.vocab_size)
    adapter = TokenFlops(2.0 * adapter_products(model, length) if continuous else 0.0, 0.0, 0.0)
    ends = {
        name: adapter if continuous and name == "image" else adapter + logits
        for name in model.modalities
    }
    for tower in model.tower_shapes:
        ends[tower.name] += _bridges(model, tower)
    return {
        name: sum((BLOCK_FLOPS.get(kind)(own, index, length) for kind, own in kinds), ends[name])
        for index, name in enumerate(model.modalities)
    }


@MODEL_FLOPS.register("vit")
def vit_flops(config: Config) -> dict[str, TokenFlops] | None:
    """Of one picture: its patches in, the blocks on all tokens, pooling and classes.

    Of rows of several pictures, that of a row divided by its places for pictures.
    """
    model: ViTConfig = config.model
    places = config.images_per_row
    num_patches = config.data.max_patches or model.num_patches
    length = num_patches + places * (model.num_tokens - model.num_patches)
    blocks = _stack(config, model, length)
    if blocks is None:
        return None
    patches = 2.0 * num_patches * model.patch_size**2 * CHANNELS * model.d_model
    total = TokenFlops(patches, 0.0, 2.0 * places * model.d_model * model.num_classes)
    return {"image": (total + blocks + _pooling(model, length, places)).scaled(1 / places)}


@MODEL_FLOPS.register("task_vit")
def task_vit_flops(config: Config) -> dict[str, TokenFlops] | None:
    """Of one picture, whatever its task."""
    image = vit_flops(config)
    return image and {name: image["image"] for name in config.model.modalities}


@MODEL_FLOPS.register("dit")
def dit_flops(config: Config) -> dict[str, TokenFlops] | None:
    """Of one noisy picture: its patches in and out, the blocks, and what they are told."""
    model: DiTConfig = config.model
    blocks, d = _stack(config, model, model.num_patches), model.d_model
    if blocks is None:
        return None
    numbers = model.num_patches * model.patch_size**2 * (model.in_channels + model.out_channels)
    # Of the noise an MLP; of the output a shift and a scale.
    told = (TIME_FEATURES + d) * d + 2 * d * d
    total = TokenFlops(2.0 * (numbers * d + told), 0.0, 0.0) + blocks
    if model.text_length:
        tower = model.text_tower
        text = _stack(config, tower, tower.text_length)
        if text is None:
            return None
        total += text + TokenFlops(2.0 * tower.d_model * d, 0.0, 0.0)
    return {name: total for name in model.modalities}


@MODEL_FLOPS.register("two_towers")
def two_towers_flops(config: Config) -> dict[str, TokenFlops] | None:
    """Of one pair: both towers, and its products with the batch."""
    model: TwoTowersConfig = config.model
    text, image = model.text_tower, vit_flops(config)
    blocks = _stack(config, text, text.text_length)
    if blocks is None or image is None:
        return None
    pair = _pair(config, model.d_model + text.d_model)
    return {"image": image["image"] + blocks + _pooling(text, text.text_length) + pair}


@MODEL_FLOPS.register("limoe")
def limoe_flops(config: Config) -> dict[str, TokenFlops] | None:
    """Of one pair: the tower on both, the two heads, and its products with the batch."""
    model: PairConfig = config.model
    image = vit_flops(config)
    if image is None:
        return None
    # One head over all tokens is not what two of them cost.
    patches = model.num_tokens - model.text_length
    heads = _pooling(model, patches) + _pooling(model, model.text_length)
    rest = image["image"] + _pooling(model, model.num_tokens).scaled(-1)
    return {"image": rest + heads + _pair(config, 2 * model.d_model)}


def _pair(config: Config, widths: int) -> TokenFlops:
    """From features into the common space, and the logits of a pair's picture and text."""
    model = config.model
    directions = 2 if config.objective.loss == "clip" else 1
    products = directions * config.data.batch_size * model.embed_dim
    return TokenFlops(2.0 * widths * model.embed_dim, 0.0, 2.0 * products)


def _stack(config: Config, model: TrunkConfig, length: int) -> TokenFlops | None:
    """All blocks on a row of that length; None if a kind of block has no formula."""
    kinds = [model.for_block(kind) for kind in model.block_kinds()]
    if not _has_formula(kinds):
        return None
    rows = config.data.batch_size // config.optim.accumulation_steps
    kinds = [(kind, _of_batch(own, rows)) for kind, own in kinds]
    costs = (BLOCK_FLOPS.get(kind)(own, 0, length).scaled(length) for kind, own in kinds)
    return sum(costs, TokenFlops(0.0, 0.0, 0.0))


def _pooling(model: Any, length: int, places: int = 1) -> TokenFlops:
    """From tokens to the features of so many pictures, or texts, in a row, by ``model.head``."""
    if model.head != "map":
        return TokenFlops(0.0, 0.0, 0.0)
    heads = model.num_heads * model.head_dim
    keys_and_values = model.d_model * 2 * model.kv_heads * model.head_dim
    products = places * 2 * model.d_model * heads + length * keys_and_values
    attention = TokenFlops(2.0 * products, 4.0 * places * length * heads, 0.0)
    return attention + _mlp(model, max(model.ffn_hidden)).scaled(places)


def _of_batch(model: Any, rows: int) -> Any:
    """With as many rows whose tokens compete, or are routed together, as a microbatch has."""
    depth = dataclasses.replace(model.depth, group=together(model.depth, rows))
    group = min(model.moe.routing_group or rows, rows)
    moe = dataclasses.replace(model.moe, routing_group=group)
    return dataclasses.replace(model, depth=depth, moe=moe)


def _has_formula(kinds: list[tuple[str, Any]]) -> bool:
    """Whether every kind of block has one, those inside of others too."""
    inside = [own.for_block(own.depth.block)[0] for kind, own in kinds if kind in AROUND_OTHERS]
    return all(kind in BLOCK_FLOPS for kind in (*(kind for kind, _ in kinds), *inside))


def adapter_products(model: DecoderConfig, length: int) -> float:
    """Multiply-adds of the patch adapter for each position of a row of that length.

    A U-Net runs on as many pictures as fit in a row (moejax/nn/patch_adapter.py, unet.py).
    """
    latents, d = model.latents, model.width_of("image")
    reader = latents.size * model.width_of(latents.read_by) if latents.read_by else 0
    if latents.adapter == "linear":
        return (2 * latents.size + TIME_FREQUENCIES) * d + reader
    width, cells = latents.unet_width, latents.patch**2
    # 3x3 convolutions in and out, two of each block (the second reads the skip as well), shortcut.
    per_cell = 9 * (2 * latents.channels * width + 5 * width**2) + 2 * width**2
    time = TIME_FREQUENCIES * width + 2 * width**2
    per_patch = cells * (per_cell + 2 * d * width) + time / latents.tokens_per_image
    patches = max_pictures(length, latents.tokens_per_image) * latents.tokens_per_image
    return per_patch * patches / length + reader


@MODEL_FLOPS.register("fsq_autoencoder")
def fsq_autoencoder_flops(config: Config) -> dict[str, TokenFlops]:
    """Encoder and decoder of one picture, around codes."""
    return {"image": _autoencoder(config.model, 2 * len(config.model.levels))}


@MODEL_FLOPS.register("kl_autoencoder")
def kl_autoencoder_flops(config: Config) -> dict[str, TokenFlops]:
    """Encoder and decoder of one picture, around latents."""
    return {"image": _autoencoder(config.model, 3 * config.model.latent_channels)}


def _autoencoder(model: AutoencoderConfig, features: int) -> TokenFlops:
    """Blocks of a 3x3 and a 1x1 convolution, linear maps from and to pixels.

    ``features`` come out of the encoder and go into the decoder.
    """
    width, pixels = model.width, model.patch_size**2 * CHANNELS
    blocks = (model.encoder_blocks + model.decoder_blocks) * (9 + 1) * width**2
    ends = (2 * pixels + features) * width
    return TokenFlops(2.0 * math.prod(model.grid) * (blocks + ends), 0.0, 0.0)


@BLOCK_FLOPS.register("untied")
def untied_block_flops(model: TrunkConfig, modality: int, length: int) -> TokenFlops:
    """A transformer block; untied weights cost what shared ones do, narrow towers less."""
    hidden = model.ffn_hidden[modality % len(model.ffn_hidden)]
    if not model.tower_shapes:
        return _attention(model, length) + _mlp(model, hidden) + _told(model, length)
    tower, h = model.tower_shapes[modality], model.head_dim
    heads = 2 * (tower.heads + tower.kv_heads) * h
    # Every token has the heads of the widest tower, be they zero.
    attention = 4.0 * length * model.num_heads * h
    return TokenFlops(2.0 * tower.width * (heads + 3 * hidden), attention, 0.0)


@BLOCK_FLOPS.register("dense")
def dense_block_flops(model: TrunkConfig, modality: int, length: int) -> TokenFlops:
    """A transformer block with everything shared: the widest feed-forward layer for all."""
    dense = _mlp(model, max(model.ffn_hidden))
    return _attention(model, length) + dense + _told(model, length)


@BLOCK_FLOPS.register("moe")
def moe_block_flops(model: TrunkConfig, modality: int, length: int) -> TokenFlops:
    """Attention and a layer of experts."""
    del modality
    return _attention(model, length) + _experts(model, length) + _told(model, length)


@BLOCK_FLOPS.register("shortcut_moe")
def shortcut_moe_block_flops(model: TrunkConfig, modality: int, length: int) -> TokenFlops:
    """Two attentions, two dense layers, one layer of experts."""
    dense = untied_block_flops(model, modality, length)
    return dense + dense + _experts(model, length)


@BLOCK_FLOPS.register("mod")
def mod_block_flops(model: TrunkConfig, modality: int, length: int) -> TokenFlops:
    """A block on some of the tokens, whose attention is among those; and their router."""
    depth = model.depth
    competing = depth.group * length
    room = depth_room(depth, competing)
    inner = _inner_flops(model, modality, room)
    return inner.scaled(room / competing) + _decision(model)


@BLOCK_FLOPS.register("recursive")
def recursive_block_flops(model: TrunkConfig, modality: int, length: int) -> TokenFlops:
    """Layers that are run several times, by fewer tokens each time; and the routers."""
    recursion = model.recursion
    total = TokenFlops(0.0, 0.0, 0.0)
    if recursion.router == "expert":
        total = _decision(model).scaled(recursion.steps)
    elif recursion.router == "token":
        total = TokenFlops(2.0 * model.d_model * recursion.steps, 0.0, 0.0)
    for index in range(recursion.steps):
        room = step_room(model, index, length)
        given = recursion.share_kv and index > 0
        # Shared keys are those of the whole row, and are not computed again, unless updated.
        layer = _inner_flops(model, modality, length if given else room)
        if given:
            # A row is told its condition once, however many of its tokens run the step.
            layer += _told(model, room) + _told(model, length).scaled(-1)
        if given and not recursion.update_kv:
            keys_and_values = 2.0 * model.d_model * 2 * model.kv_heads * model.head_dim
            layer = dataclasses.replace(layer, weights=layer.weights - keys_and_values)
        total += layer.scaled(recursion.layers * room / length)
    return total


def _inner_flops(model: TrunkConfig, modality: int, length: int) -> TokenFlops:
    kind, own = model.for_block(model.depth.block)
    return BLOCK_FLOPS.get(kind)(own, modality, length)


def _decision(model: TrunkConfig) -> TokenFlops:
    """A score, and the predictor that decides in its place."""
    depth, d = model.depth, model.d_model
    products, detached = d * (2 if depth.gate == "softmax" else 1), 0
    if depth.causal_rule == "predictor":
        detached = d * (depth.predictor_hidden or d // 2)
        products += detached + detached // d
    return TokenFlops(2.0 * products, 0.0, 0.0, 2.0 * detached)


def _attention(model: TrunkConfig, length: int) -> TokenFlops:
    d, h = model.d_model, model.head_dim
    projections = d * (model.num_heads + 2 * model.kv_heads) * h + model.num_heads * h * d
    # Each query meets `length` keys, then as many values.
    return TokenFlops(2.0 * projections, 4.0 * length * model.num_heads * h, 0.0)


def _told(model: TrunkConfig, length: int) -> TokenFlops:
    """The shift, the scale and the gate of two branches, once for each row; and of words."""
    products = 6 * model.d_model**2 / length if model.modulated else 0.0
    words = _words(model, length) if isinstance(model, DiTConfig) else TokenFlops(0.0, 0.0, 0.0)
    return TokenFlops(2.0 * products, 0.0, 0.0) + words


def _words(model: DiTConfig, length: int) -> TokenFlops:
    """Attention to the words of a text, of which keys and values are made once for each row.

    With experts of places: all of them, the gate of the words, and the sums over both.
    """
    words, heads, h = model.words, model.num_heads, model.head_dim
    if not words.attend:
        return TokenFlops(0.0, 0.0, 0.0)
    texts, width = model.text_length, model.text_tower.d_model
    e, d = words.num_experts, model.d_model
    products = 2 * d * heads * h + texts * width * 2 * model.kv_heads * h / length
    products += (6 if e else 3) * d**2 / length
    products += e * (texts * width / length + texts + (2 if words.outside else 1) * d)
    attention = TokenFlops(2.0 * products, 4.0 * texts * heads * h, 0.0)
    return attention + _mlp(model, e * words.hidden, words.activation)


def _bridges(model: TrunkConfig, tower: Tower) -> TokenFlops:
    """From the heads of a tower to the common ones and back, in layers that share attention."""
    layers = sum(model.share_attention) if model.share_attention else model.num_layers
    pairs = 2 * tower.heads * model.num_heads + 2 * tower.kv_heads * model.kv_heads
    products = layers * pairs * model.head_dim**2 if tower.bridged else 0
    return TokenFlops(2.0 * products, 0.0, 0.0)


def _mlp(model: TrunkConfig, width: float, activation: str = "") -> TokenFlops:
    """SwiGLU of three matrices, or another MLP of two; "" is that of the dense layers."""
    matrices = 3 if (activation or model.ffn_activation) == "swiglu" else 2
    return TokenFlops(2.0 * matrices * model.d_model * width, 0.0, 0.0)


def _experts(model: TrunkConfig, length: int) -> TokenFlops:
    """The router, the experts that a token runs on average, and what is shared.

    Of soft routing also the mixing into slots and back. Sums for losses and statistics are left
    out.
    """
    moe = model.moe
    if moe.kind == "film":
        of_film = film_products(model) + router_products(model)
        shared = _mlp(model, moe.shared_hidden, moe.activation)
        return (TokenFlops(2.0 * of_film, 0.0, 0.0) + shared).scaled(moe.iterations)
    width = expert_rows(moe, length) * (moe.hidden or max(model.ffn_hidden)) + moe.shared_hidden
    mixing = 2 * model.d_model * soft_slots(moe)
    router = TokenFlops(2.0 * (router_products(model) + mixing), 0.0, 0.0)
    detached = model.d_model * (moe.causal_router_hidden or model.d_model // 2)
    router = dataclasses.replace(router, detached=2.0 * detached * moe.causal_router)
    return (_mlp(model, width, moe.activation) + router).scaled(moe.iterations)
