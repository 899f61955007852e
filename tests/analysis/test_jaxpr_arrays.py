"""The largest arrays of a program that no compiler has seen."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.analysis.jaxpr_arrays import largest_arrays


def test_in_loops_and_on_all_devices():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    outer = lambda x: jnp.einsum("ij,kj->ik", x, x)
    local = jax.shard_map(outer, mesh=mesh, in_specs=P("x"), out_specs=P("x"))

    def program(x):
        with jax.named_scope("inside"):
            x = local(x) @ jnp.ones((2, 8))
        with jax.named_scope("loop"):
            return lax.scan(lambda x, _: (outer(x)[:, :8], None), x, length=3)[0]

    jaxpr = jax.make_jaxpr(program)(jax.ShapeDtypeStruct((8, 8), jnp.float32))
    found = {array.shape: array for array in largest_arrays(jaxpr)}
    # 8 x 8 in the body of the loop, on no device more than once.
    assert found[8, 8].bytes == 8 * 8 * 4
    # Each of four devices makes a 2 x 2 of its own rows.
    assert found[2, 2].bytes == 4 * 2 * 2 * 4
    assert found[2, 2].scope.startswith("inside/") and found[2, 2].dtype == "float32"
    sizes = [array.bytes for array in largest_arrays(jaxpr, 3)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 3
