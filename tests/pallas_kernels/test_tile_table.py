"""Tables of tiles: what the command writes, legal on each chip, and what the kernels take."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import tabulate, tile_table
from pallas_kernels.grouped_matmul import blocks, gpu, tpu
from pallas_kernels.versions import target_chip, vmem_capacity

# Shared memory of one block of threads, and threads of four warps that multiply together.
HOPPER_SHARED, HOPPER_ROWS = 227 << 10, 64


def on(chip):
    """As if for that chip."""
    _, platform, kind = tabulate.CHIPS[chip]
    device = AbstractDevice(kind, 1, platform)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("name", [pytest.param("tpu", marks=pytest.mark.slow), "gpu"])
def test_the_file_is_what_the_command_writes(name, tmp_path, monkeypatch):
    """Unmeasured lines are what the kernels take without a table; a measured one stays."""
    text = tile_table.table_file(name).read_text()
    monkeypatch.setattr(tile_table, "table_file", lambda name: tmp_path / name)
    entries = tabulate.unmeasured(name)
    tile_table.write_table(name, entries)
    assert (tmp_path / name).read_text() == text
    header, *lines = text.splitlines()
    measured = lines[3].replace(",unmeasured", ",2026-12-01")
    (tmp_path / name).write_text("\n".join([header, *lines[:3], measured, *lines[4:], ""]))
    tile_table.write_table(name, entries)
    assert (tmp_path / name).read_text().splitlines() == [
        header,
        measured,
        *(line for line in lines if line != lines[3]),
    ]


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_entries_for_tpus_fit(chip):
    entries = {key: found for key, found in blocks.TABLE.items() if key.chip == chip}
    assert entries
    with on(chip):
        assert target_chip() == chip
        capacity = vmem_capacity()
    for key, found in entries.items():
        sides, itemsizes = (key.inner, key.outer), (key.x_bytes, key.w_bytes)
        of = blocks.Product(
            *(key.rows_per_group, *sides, 1, key.parts, key.views, itemsizes),
            *(key.column_bytes, key.numbers, bool(key.exact)),
        )
        assert blocks.fits(key.kernel, of, found, capacity), key
        with on(chip):
            allowed = blocks.tiles(key.kernel, of)
        assert dataclasses.replace(allowed, vmem_bytes=None) == found
        assert allowed.vmem_bytes and 0.75 * capacity < allowed.vmem_bytes < capacity
        assert found.rows <= key.rows_per_group and found.step % 8 == 0, key
        # Parts are of the contracted dimension, or of the columns of a sum over groups.
        parts = (key.parts, 1) if key.kernel == "rows" else (1, key.parts)
        whole = [side // part for side, part in zip(sides, parts, strict=True)]
        for size, width in zip((found.inner, found.outer), whole, strict=True):
            assert size == width or (size % 128 == 0 and size < width), key
        divided = (parts[0] > 1, parts[1] > 1 or key.views > 1 or key.exact)
        for must, size, width in zip(divided, (found.inner, found.outer), whole, strict=True):
            assert not must or width % size == 0, key


@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_entries_for_gpus_fit(chip):
    entries = {key: found for key, found in gpu.TABLE.items() if key.chip == chip}
    assert entries
    with on(chip):
        assert target_chip() == chip
    for key, found in entries.items():
        fetched = 2 * found.steps * found.inner * (found.rows + found.outer)
        assert fetched + found.rows * found.outer * key.out_bytes < HOPPER_SHARED, key
        assert found.rows % HOPPER_ROWS == 0 and found.outer % 64 == found.inner % 64 == 0, key


def test_rows_of_a_group_are_rounded_down():
    assert tile_table.rows_per_group(3, 8) == 1
    assert tile_table.rows_per_group(768 * 64, 64) == 512
    assert tile_table.rows_per_group(2 * 12288, 2) == 4096


def bfloat16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def products(backend, rows):
    """Jaxprs (x w, x' y) of four groups, 2,048 by 1,408."""
    options = {"group_offset": 0, "out_dtype": "bfloat16", "interpret": False}
    x, w, y = bfloat16(rows, 1408), bfloat16(4, 1408, 2048), bfloat16(rows, 2048)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    multiply = functools.partial(backend.grouped_matmul, transpose_rhs=False, **options)
    sums = functools.partial(backend.grouped_matmul_t, num_local=4, **options)
    return jax.make_jaxpr(multiply)(x, w, sizes), jax.make_jaxpr(sums)(x, y, sizes)


def scratch(jaxpr):
    """Shape of the float32 sums of the Pallas call: columns, and rows of the tile or of the sum."""
    (call,) = (e for e in jaxpr.eqns if e.primitive.name == "pallas_call")
    return call.params["jaxpr"].invars[-1].aval.shape


def test_kernels_for_tpus_take_the_entry_of_their_chip(monkeypatch):
    """And the search's where there is none: on another chip, for fewer rows."""
    for kernel, found in (("rows", (256, 128, 256, 64)), ("groups", (128, 256, 512, 64))):
        (key,) = (
            key
            for key in blocks.TABLE
            if key[:3] == ("v5p", kernel, 4096) and key.inner == 1408 and key.x_bytes == 2
        )
        assert key.outer == 2048
        monkeypatch.setitem(blocks.TABLE, key, blocks.Blocks(*found))
    with on("v5p"):
        rows, groups = products(tpu, 4 * 5000)
        assert (scratch(rows), scratch(groups)) == ((256, 256), (256, 512))
        fewer = products(tpu, 4 * 256)
        assert [scratch(jaxpr) for jaxpr in fewer] == [(512, 2048), (1408, 2048)]
    with on("v6e"):
        assert scratch(products(tpu, 4 * 5000)[0]) == (512, 2048)


def test_kernels_for_gpus_take_the_entry_of_their_chip(monkeypatch):
    small = gpu.Blocks(64, 192, 64, 2, 1)
    for kernel in ("rows", "groups"):
        key = gpu.Key("h200", kernel, 4096, 1408, 2048, 2)
        assert key in gpu.TABLE
        monkeypatch.setitem(gpu.TABLE, key, small)
    for chip, rows, tile in (
        ("h200", 4 * 5000, "bf16[64,192]"),
        ("h200", 4 * 256, "bf16[128,128]"),
        ("h100", 4 * 5000, "bf16[128,128]"),
    ):
        with on(chip):
            for jaxpr in products(gpu, rows):
                stored = {"bf16[64,192]", "bf16[128,128]"}
                assert {text for text in stored if text in str(jaxpr)} == {tile}
