"""How tokens meet experts that lie on other devices: one function for each way.

Each runs inside ``shard_map``, where the devices along the mesh axis "expert" hold ``num_local``
experts each, in order. ``run(tokens)`` gives ``sum_k gates * E(x)`` over the experts that lie here,
counted from 0; other ids add nothing. All ways give the same sums; they differ in
what travels and in how many rows are held.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import combine_rows, dispatch_rows
from pallas_kernels.tiles import zeros

AXIS = "expert"
# In the order in which ties of the volume rule are decided.
EXCHANGES = ("fsdp", "ring", "all_to_all", "ragged", "replicated")


def choose_exchange(
    named: str,
    *,
    devices: int,
    split: bool,
    tokens: int,
    k: int,
    width: int,
    weights: int,
    buffer: float = 0.0,
) -> str:
    """The exchange to use: ``named``, or for ``auto`` the one that moves the fewest numbers.

    Received by each device in the forward pass (the backward moves in proportion): ``fsdp`` all
    weights it has not, ``ring`` the tokens of all others and its sums from them, ``all_to_all`` its
    buffers, twice.

    Args:
      named: ``auto`` or one of ``EXCHANGES``.
      devices: along the expert axis; on one all is here.
      split: whether tokens are split over that axis; else ``replicated`` is all that is right.
      tokens: of each device.
      k: experts of a token.
      width: of the model.
      weights: numbers in the matrices of all experts of the layer.
      buffer: as in :func:`exchange`.
    """
    if devices == 1:
        return "fsdp"
    if not split:
        return "replicated"
    if named != "auto":
        return named
    others = devices - 1
    volumes = {
        "fsdp": weights * others / devices,
        "ring": 2 * others * tokens * width,
        "all_to_all": 2 * others * places_for(tokens, k, devices, buffer) * width,
    }
    return min(volumes, key=lambda name: volumes[name])


class Tokens(NamedTuple):
    """Tokens of a device and the experts, of all, that they chose."""

    x_td: Float[Array, "t d"]
    ids: Int[Array, "t k"]
    gates: Float[Array, "t k"]


def exchange(
    name: str,
    run: Callable[[Tokens], Array],
    tokens: Tokens,
    num_local: int,
    buffer: float = 0.0,
) -> tuple[Float[Array, "t d"], Int[Array, "t k"]]:
    """``sum_k gates * E_{ids}(x)`` for the tokens of this device, and the ids that were run.

    They are ``tokens.ids``, with -1 for choices that were lost for want of room in a buffer.

    Args:
      name: ``fsdp``: the weights of all experts are here, nothing travels. ``replicated``: each
        device has the same tokens, and the outputs are summed. ``ring``: tokens are gathered from
        all, and outputs summed back where they came from. ``all_to_all``: a token travels once to
        each device where it has an expert, in buffers of equal size. ``ragged``: the same with
        exact counts.
      run: the experts that lie here, see above.
      tokens: of this device.
      num_local: experts of each device.
      buffer: rows of a buffer of ``all_to_all``, and of what ``ragged`` receives from one device
        on average, over the even share ``t * min(k, devices) / devices``; tokens that do not fit
        lose the experts there, the last first. 0 holds whatever comes.

    Raises:
      ValueError: no such exchange.
    """
    if name == "fsdp":
        return run(tokens), tokens.ids
    if name not in EXCHANGES:
        raise ValueError(f"no exchange {name!r}: {', '.join(EXCHANGES)}")
    first = lax.axis_index(AXIS) * num_local
    if name == "replicated":
        own = tokens._replace(ids=local_ids(tokens.ids, first, num_local))
        return _sum(lax.psum, run(own)), tokens.ids
    if name == "ring":
        everyone = Tokens(*(lax.all_gather(x, AXIS, tiled=True) for x in tokens))
        own = everyone._replace(ids=local_ids(everyone.ids, first, num_local))
        return _sum(functools.partial(lax.psum_scatter, tiled=True), run(own)), tokens.ids
    send = _all_to_all if name == "all_to_all" else _ragged
    out_td, arrived_ts = send(run, tokens, first, num_local, buffer)
    return out_td, _without_lost(tokens.ids, arrived_ts, num_local)


def _without_lost(ids: Array, arrived_ts: Array, num_local: int) -> Array:
    """-1 for choices of a device where the token did not arrive."""
    devices = arrived_ts.shape[1]
    device = ids // num_local
    away = ~jnp.take_along_axis(arrived_ts, jnp.clip(device, 0, devices - 1), axis=1)
    return jnp.where(away & (device >= 0) & (device < devices), -1, ids)


def local_ids(ids: Array, first: Array, num_local: int) -> Array:
    """Ids counted from ``first`` on; those of other devices become ``num_local``, no choice."""
    here = (ids >= first) & (ids < first + num_local)
    return jnp.where(here, ids - first, num_local)


def _sum(collective: Callable, out: Array) -> Array:
    """Partial sums of many devices are added in float32 or wider."""
    wide = jnp.promote_types(out.dtype, jnp.float32)
    return collective(out.astype(wide), AXIS).astype(out.dtype)


class Journeys(NamedTuple):
    """Which token goes to which device: rows sorted by device, then by token.

    Attributes:
      token: of each row; t (one past the end) where a row is empty.
      row: where the copy of token t for device s lies; ``rows`` where there is none.
      counts: rows for each device.
    """

    token: Int[Array, " rows"]
    row: Int[Array, "t s"]
    counts: Int[Array, " s"]


def journeys(ids: Int[Array, "t k"], devices: int, num_local: int, places: int, padded: bool):
    """The :class:`Journeys` of tokens, at most ``places`` to a device, the last are dropped.

    With ``padded`` the rows for device s begin at ``s * places``, else they follow each other.
    """
    t = ids.shape[0]
    goes = (ids[:, :, None] // num_local == jnp.arange(devices)[None, None]).any(axis=1)
    place = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - goes
    kept = goes & (place < places)
    counts = jnp.minimum(goes.sum(axis=0, dtype=jnp.int32), places)
    rows = places * devices
    start = jnp.arange(devices) * places if padded else jnp.cumsum(counts) - counts
    row = jnp.where(kept, start[None] + place, rows).astype(jnp.int32)
    token = jnp.full((rows,), t, jnp.int32)
    numbers = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[:, None], row.shape)
    return Journeys(token.at[row].set(numbers, mode="drop"), row, counts)


def places_for(t: int, k: int, devices: int, buffer: float) -> int:
    """Rows for one device: see ``buffer`` of :func:`exchange`."""
    even = t * min(k, devices) / devices
    return t if buffer == 0 else min(t, max(1, math.ceil(buffer * even)))


def _packed(tokens: Tokens, plan: Journeys) -> tuple[Array, Array, Array]:
    """Rows of x, ids and gates; the ids of an empty row are no choice."""
    x = dispatch_rows(tokens.x_td, plan.token, plan.row)
    gates = dispatch_rows(tokens.gates, plan.token, plan.row)
    ids = jnp.take(tokens.ids, plan.token, axis=0, mode="fill", fill_value=-1)
    return x, ids, gates


def _all_to_all(run, tokens: Tokens, first, num_local: int, buffer: float):
    devices = lax.axis_size(AXIS)
    t, k = tokens.ids.shape
    places = places_for(t, k, devices, buffer)
    plan = journeys(tokens.ids, devices, num_local, places, padded=True)
    swap = lambda rows: lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0, tiled=True)
    x, ids, gates = map(swap, _packed(tokens, plan))
    out = run(Tokens(x, local_ids(ids, first, num_local), gates))
    return combine_rows(swap(out), plan.token, plan.row), plan.row < plan.token.shape[0]


def _ragged(run, tokens: Tokens, first, num_local: int, buffer: float):
    devices = lax.axis_size(AXIS)
    t, k = tokens.ids.shape
    # A token goes to at most min(k, devices) of them; what is received may be more.
    plan = journeys(tokens.ids, devices, num_local, t, padded=False)
    plan = _first_rows(plan, t * min(k, devices))
    received = devices * places_for(t, k, devices, buffer)
    route = routes(plan.counts, received)
    x, ids, gates = _packed(tokens, plan)
    x = ragged_exchange(x, received, route)
    gates = ragged_exchange(gates, received, route)
    # Zeros are what rows hold that nobody sent; ids count from 1 on the way.
    ids = ragged_exchange(ids + 1, received, route) - 1
    out = run(Tokens(x, local_ids(ids, first, num_local), gates))
    back = ragged_exchange(out, plan.token.shape[0], route.reverse())
    place = plan.row - route.input_offsets[None]
    return combine_rows(back, plan.token, plan.row), place < route.send_sizes[None]


def _first_rows(plan: Journeys, rows: int) -> Journeys:
    row = jnp.where(plan.row < rows, plan.row, rows)
    return Journeys(plan.token[:rows], row, plan.counts)


class Route(NamedTuple):
    """Who sends how many rows where: the arguments of ``lax.ragged_all_to_all``, and back.

    All are [devices]: from where in my rows I send to each, how many, where in its rows they land,
    how many I get from each; and where in my rows those from each lie, where in its rows mine
    began.
    """

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array
    recv_offsets: Array
    sender_offsets: Array

    def reverse(self) -> "Route":
        return Route(
            input_offsets=self.recv_offsets,
            send_sizes=self.recv_sizes,
            output_offsets=self.sender_offsets,
            recv_sizes=self.send_sizes,
            recv_offsets=self.input_offsets,
            sender_offsets=self.output_offsets,
        )


def routes(counts: Int[Array, " s"], received: int) -> Route:
    """The route of rows sorted by device, ``counts`` to each; a device takes ``received`` rows.

    Rows beyond are not sent, those of the last senders first.
    """
    me = lax.axis_index(AXIS)
    # [from, to]
    wanted = lax.all_gather(counts, AXIS)
    starts = jnp.cumsum(wanted, axis=1) - wanted
    arrival = jnp.cumsum(wanted, axis=0) - wanted
    sizes = jnp.clip(received - arrival, 0, wanted)
    arrival = jnp.minimum(arrival, received)
    return Route(
        input_offsets=starts[me],
        send_sizes=sizes[me],
        output_offsets=arrival[me],
        recv_sizes=sizes[:, me],
        recv_offsets=arrival[:, me],
        sender_offsets=starts[:, me],
    )


def ragged_exchange(rows_rd: Array, received: int, route: Route) -> Array:
    """Rows [received, d] that were sent here along ``route``; zeros where nobody sent any.

    Its gradient is the exchange along the reverse route, whose offsets are known here: the
    transpose that jax has for ``ragged_all_to_all`` exchanges them anew.
    """
    return _ragged_exchange((rows_rd.shape[0], received), rows_rd, route)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_exchange(sizes, rows_rd, route):
    return _send(rows_rd, sizes[1], route)


def _exchange_fwd(sizes, rows_rd, route):
    return _send(rows_rd, sizes[1], route), route


def _exchange_bwd(sizes, route, dout_rd):
    return _send(dout_rd, sizes[0], route.reverse()), None


_ragged_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def _send(rows_rd: Array, received: int, route: Route) -> Array:
    out = zeros((received, *rows_rd.shape[1:]), rows_rd.dtype, like=rows_rd)
    send = functools.partial(lax.ragged_all_to_all, axis_name=AXIS)
    offsets = (route.input_offsets, route.send_sizes, route.output_offsets, route.recv_sizes)
    return lax.platform_dependent(rows_rd, out, *offsets, cpu=_emulated, default=send)


def _emulated(rows, out, input_offsets, send_sizes, output_offsets, recv_sizes):
    """``lax.ragged_all_to_all`` for CPU, whose compiler has none: everything is gathered."""
    del recv_sizes
    me = lax.axis_index(AXIS)
    everyone = [lax.all_gather(x, AXIS) for x in (rows, input_offsets, send_sizes, output_offsets)]
    place = jnp.arange(out.shape[0])

    def receive(out, sent):
        rows, input_offsets, send_sizes, output_offsets = sent
        i = place - output_offsets[me]
        mine = (i >= 0) & (i < send_sizes[me])
        source = jnp.clip(input_offsets[me] + i, 0, rows.shape[0] - 1)
        return jnp.where(mine[:, None], rows[source], out), None

    return lax.scan(receive, out, tuple(everyone))[0]
