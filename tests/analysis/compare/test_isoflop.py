"""Fits of sizes and scaling laws on losses whose law is known."""

import numpy as np
import pytest

from moejax.analysis.compare.isoflop import Law, Points, best_size, fit_law, width_arms
from moejax.config import load_config
from moejax.errors import UserError

LAW = Law(e=1.7, a=400.0, alpha=0.34, b=410.0, beta=0.28)
SIZES = np.geomspace(1e6, 3e7, 6)


def points(law: Law, budgets=(1e15, 3e15, 1e16), noise: float = 0.0) -> Points:
    budgets = np.array(budgets)
    losses = law.loss(SIZES[:, None], budgets[None] / (6 * SIZES[:, None]))
    rng = np.random.default_rng(0)
    return Points(SIZES, budgets, losses * np.exp(rng.normal(0, noise, losses.shape)))


def test_tokens_are_what_the_budget_buys():
    assert 6 * SIZES[2] * points(LAW).tokens[2] == pytest.approx([1e15, 3e15, 1e16])


def test_the_law_is_found_again():
    got = fit_law(points(LAW))
    assert (got.e, got.alpha, got.beta) == pytest.approx((1.7, 0.34, 0.28), rel=0.02)
    assert got.size_exponent == pytest.approx(0.28 / 0.62, rel=0.02)
    noisy = fit_law(points(LAW, noise=1e-3))
    assert noisy.size_exponent == pytest.approx(0.28 / 0.62, rel=0.25)


def test_best_size_is_the_bottom_of_the_parabola():
    x = np.log(SIZES)
    losses = 3 + 0.2 * (x - np.log(7e6)) ** 2
    assert best_size(SIZES, losses) == pytest.approx((7e6, 3.0))
    # By the law at 1e16 FLOPs: a (6 C / ...) power; the parabola is close to it.
    exact = (LAW.alpha * LAW.a / (LAW.beta * LAW.b)) ** (1 / (LAW.alpha + LAW.beta))
    exact *= (1e16 / 6) ** LAW.size_exponent
    got = best_size(SIZES, points(LAW).losses[:, 2])
    assert got is not None and got[0] == pytest.approx(exact, rel=0.1)


def test_no_size_is_extrapolated():
    x = np.log(SIZES)
    assert best_size(SIZES, 3 + 0.2 * (x - np.log(1e8)) ** 2) is None, "outside of the sizes"
    assert best_size(SIZES, 3 - 0.2 * (x - np.log(7e6)) ** 2) is None, "opens downwards"


def test_widths_keep_the_shape():
    arms = width_arms("moma", [64, 128, 256], [])
    models = [load_config(arm.spec, arm.overrides).model for arm in arms]
    assert [model.d_model for model in models] == [64, 128, 256]
    assert {model.head_dim for model in models} == {32}
    assert [model.ffn_hidden for model in models] == [(256,), (512,), (1024,)]
    assert [model.moe.hidden for model in models] == [256, 512, 1024]
    assert models[1] == load_config("moma", {"model.head_size": 32, "model.num_kv_heads": 4}).model


@pytest.mark.parametrize(
    ("spec", "widths", "message"),
    [
        ("mot", [64, 128], "3 different widths"),
        ("mot", [64, 128, 100], "100 is no multiple of the head size 32"),
        ("tokenizer_fsq", [64, 128, 256], "not a fsq_autoencoder"),
    ],
)
def test_refusals(spec, widths, message):
    with pytest.raises(UserError, match=message):
        width_arms(spec, widths, [])
