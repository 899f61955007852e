"""Samplers on data whose posterior mean is known, guidance, and the independence of rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.diffusion import Diffusion
from moejax.errors import UserError
from moejax.ops.diffusion import add_noise, path, target
from moejax.ops.diffusion_times import time_grid
from moejax.ops.samplers import SAMPLERS, guide, guided, row_noise, sample

from .analytic import EVERY, gaussian, mixture, network_of

pytestmark = pytest.mark.usefixtures("quick_compiles")

FLOW = EVERY["flow"]


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def draw(diffusion, sampler, posterior_mean, noise, steps, **options):
    grid = time_grid(diffusion, steps)
    network = network_of(diffusion, posterior_mean)
    run = jax.jit(lambda x: sample(diffusion, sampler, network, x, grid, keys(len(x)), **options))
    return run(noise)


def test_all_samplers_are_registered():
    assert set(SAMPLERS) == {"ddim", "ddpm", "euler", "heun", "dpmpp_2m", "sde"}
    with pytest.raises(UserError, match="sampler: no sampler 'hein'; did you mean 'heun'"):
        sample(FLOW, "hein", lambda x, t: x, jnp.zeros((1, 2)), time_grid(FLOW, 2))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun", "dpmpp_2m", "sde"])
@pytest.mark.parametrize("name", EVERY)
def test_a_point_mass_is_reached_in_one_step(name, sampler):
    """From any noise the exact network leads to the one point there is."""
    point = jnp.asarray([0.8, -1.7, 0.3])
    noise = row_noise(keys(4, seed=1), 0, (3,))
    found = draw(EVERY[name], sampler, lambda x, a, b: point[None] + 0 * x, noise, 1)
    # Of eps at the end of the cosine schedule, a divides rounding errors of 1e-7 by 5e-5.
    atol = 2e-2 if name == "cosine_eps" else 1e-4
    np.testing.assert_allclose(found.final, np.tile(point, (4, 1)), atol=atol)


# Euler's and Heun's steps are straight, and so are the paths of "flow" and "edm" alone.
STRAIGHT = [name for name in EVERY if EVERY[name].process != "ddpm"]


@pytest.mark.parametrize(
    "name, sampler",
    [
        *((name, sampler) for name in EVERY for sampler in ("ddim", "dpmpp_2m")),
        *((name, sampler) for name in STRAIGHT for sampler in ("euler", "heun")),
    ],
)
def test_a_step_goes_along_the_path_of_a_point_mass(name, sampler):
    """Half way the noise that it began with and the point are mixed as the process says."""
    diffusion, noise = EVERY[name], row_noise(keys(4, seed=1), 0, (3,))
    point = jnp.asarray([[0.8, -1.7, 0.3]])
    top, middle = (2.0, 1.0) if name == "edm" else (0.9, 0.5)
    network = network_of(diffusion, lambda x, a, b: point + 0 * x)
    grid = jnp.float32([top, middle])
    start = path(diffusion, grid[0], noise)
    # What a sampler begins with is b times noise; beside the point that is this noise.
    eps = noise - start.a / start.b * point
    end = path(diffusion, grid[1], noise)
    expected = end.a * point + end.b * eps
    found = sample(diffusion, sampler, network, noise, np.asarray(grid)).final
    np.testing.assert_allclose(found, expected, atol=1e-4)


WEIGHTS = jnp.asarray([0.5, 0.3, 0.2])
MEANS = jnp.asarray([[1.5, 0.0], [-1.0, 1.2], [-0.6, -1.4]])
STDS = jnp.asarray([0.15, 0.3, 0.2])
DRAWS = 4000


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "heun", "dpmpp_2m", "sde"])
@pytest.mark.parametrize("name", ["flow_to_data", "cosine_eps", "linear_v", "edm"])
def test_a_mixture_of_gaussians_is_reached(name, sampler):
    """Each mode gets its share of the samples, with its mean and its covariance."""
    noise = row_noise(keys(DRAWS, seed=2), 0, (2,))
    steps = 60 if sampler in ("heun", "dpmpp_2m") else 250
    found = draw(EVERY[name], sampler, mixture(WEIGHTS, MEANS, STDS), noise, steps)
    samples = np.asarray(found.final, np.float64)
    distance = np.linalg.norm(samples[:, None] - np.asarray(MEANS), axis=-1)
    mode = distance.argmin(axis=1)
    for k in range(3):
        own = samples[mode == k]
        # Four standard errors of a share, and what the steps leave.
        assert len(own) / DRAWS == pytest.approx(float(WEIGHTS[k]), abs=0.03 + 0.01)
        np.testing.assert_allclose(own.mean(axis=0), MEANS[k], atol=0.04)
        covariance = np.cov(own.T)
        np.testing.assert_allclose(covariance, STDS[k] ** 2 * np.eye(2), atol=0.25 * STDS[k] ** 2)


def gaussian_error(name, sampler, steps):
    """Mean distance of a deterministic sampler's result from where the equation really leads."""
    mean, std = 0.6, 0.4
    diffusion = EVERY[name]
    noise = row_noise(keys(64, seed=3), 0, (1,))
    start = jnp.asarray(time_grid(diffusion, steps)[0])
    a, b, *_ = path(diffusion, start, noise)
    # The equation keeps each sample's place in the distribution.
    exact = mean + std * (b * noise - a * mean) / jnp.sqrt(a**2 * std**2 + b**2)
    found = draw(diffusion, sampler, gaussian(mean, std), noise, steps).final
    return float(jnp.abs(found - exact).mean())


@pytest.mark.parametrize("name", ["flow", "cosine_eps", "edm"])
def test_heun_and_2m_converge_faster_than_euler(name):
    """With four times the steps the error is a quarter of Euler's and DDIM's, less of the others.

    A sixteenth is what order 2 would give if all steps were alike; those next to t = 1 of "flow"
    and next to 0 of the cosine schedule are not.
    """
    few, many = (
        {
            sampler: gaussian_error(name, sampler, steps)
            for sampler in ("euler", "ddim", "heun", "dpmpp_2m")
        }
        for steps in (25, 100)
    )
    for sampler in ("euler", "ddim"):
        assert 3 < few[sampler] / many[sampler] < 5
    for sampler in ("heun", "dpmpp_2m"):
        assert few[sampler] / many[sampler] > 6
        for error in (few, many):
            assert error[sampler] < 0.5 * min(error["euler"], error["ddim"])


def test_euler_of_flow_and_edm_is_ddim_and_of_ddpm_goes_along_the_angle():
    noise = row_noise(keys(8), 0, (2,))
    both = lambda name: [
        draw(EVERY[name], sampler, gaussian(0.5, 0.3), noise, 5).final
        for sampler in ("euler", "ddim")
    ]
    for name in ("flow", "edm"):
        np.testing.assert_allclose(*both(name), atol=1e-4)
    euler, ddim = both("cosine_eps")
    assert np.abs(np.asarray(euler - ddim)).max() > 1e-2


def test_both_directions_of_time_agree():
    """The same network but for 1 - t and the sign draws the same samples, with noise or without."""
    noise = row_noise(keys(8), 0, (2,))
    posterior_mean = mixture(WEIGHTS, MEANS, STDS)
    for sampler in ("heun", "sde"):
        there, back = (
            draw(EVERY[name], sampler, posterior_mean, noise, 10).final
            for name in ("flow", "flow_to_data")
        )
        np.testing.assert_allclose(there, back, atol=1e-4)


def test_two_steps_of_2m_by_hand():
    """Of "edm", whose log(a / b) is -log(sigma): first order, then a step twice as long."""
    diffusion = EVERY["edm"]
    noise = row_noise(keys(3), 0, (2,))
    network = network_of(diffusion, lambda x, a, b: jnp.sin(x) + b)
    found = sample(diffusion, "dpmpp_2m", network, noise, np.float32([4.0, 2.0, 0.5])).final
    x = 4 * np.asarray(noise, np.float64)
    first = np.sin(x) + 4
    x = x / 2 + (1 - 1 / 2) * first
    second = np.sin(x) + 2
    # r = h_before / h = 1 / 2
    ahead = (1 + 1 / (2 * 0.5)) * second - 1 / (2 * 0.5) * first
    np.testing.assert_allclose(found, x / 4 + (1 - 1 / 4) * ahead, rtol=1e-4, atol=1e-4)


def test_the_step_of_the_sde_by_hand():
    """From t = 1 to 1/2 of the flow: the slope and eps, and noise of variance 2 b / 2."""
    noise, key_b = row_noise(keys(3), 0, (2,)), keys(3, seed=5)
    velocity = lambda x, told_b: 0.5 * x + told_b[:, None]
    grid = np.float32([1.0, 0.5])
    found = sample(FLOW, "sde", velocity, noise, grid, key_b).final
    slope = 0.5 * noise + 1
    # eps = x + (1 - t) v
    expected = noise - 0.5 * (slope + noise) + row_noise(key_b, 1, (2,))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_ddpm_step_is_the_papers():
    """Mean and variance of a single step as equations 7 and 11 of the DDPM paper write them."""
    beta = np.linspace(1e-4, 0.02, 1000)
    abar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    noise, key_b = np.asarray(row_noise(keys(4), 0, (3,)), np.float64), keys(4, seed=9)
    for i in (2, 960):
        x = np.sqrt(1 - abar[i]) * noise
        eps = np.tanh(x)
        mean = (x - beta[i - 1] / np.sqrt(1 - abar[i]) * eps) / np.sqrt(1 - beta[i - 1])
        std = np.sqrt((1 - abar[i - 1]) / (1 - abar[i]) * beta[i - 1])
        grid = np.float32([i / 1000, (i - 1) / 1000])
        network = lambda seen, told_b: jnp.tanh(seen)
        found = sample(EVERY["linear_eps"], "ddpm", network, jnp.float32(noise), grid, key_b).final
        expected = mean + std * np.asarray(row_noise(key_b, 1, (3,)))
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_ancestral_noise_has_the_learned_variance():
    """-1 gives the variance of q(x_s | x_t, x0), 1 that of q(x_t | x_s), 0 their geometric mean."""
    diffusion = Diffusion("ddpm", schedule="linear", learned_range=True)
    grid = np.float32([0.3, 0.1])
    at_t, at_s = (path(diffusion, jnp.float32(t), jnp.zeros(())) for t in grid)
    beta = 1 - (at_t.a / at_s.a) ** 2
    low = math.sqrt(beta * (1 - at_s.a**2) / (1 - at_t.a**2))
    noise, key_b = row_noise(keys(5), 0, (4,)), keys(5, seed=7)
    # The network says that all of x is noise.
    x = at_t.b * noise
    kept = at_t.a * at_s.b / (at_s.a * at_t.b)
    mean = at_s.a * (x - at_t.b * x) / at_t.a + at_s.b * kept * x
    for value, std in ((-1, low), (1, math.sqrt(beta)), (0, math.sqrt(low * math.sqrt(beta)))):
        network = lambda x, told_b, value=value: jnp.concatenate([x, 0 * x + value], axis=-1)
        found = sample(diffusion, "ddpm", network, noise, grid, key_b).final
        np.testing.assert_allclose(found, mean + std * row_noise(key_b, 1, (4,)), atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "sde"])
def test_a_row_does_not_depend_on_the_others(sampler):
    grid, key_b = time_grid(FLOW, 6), keys(5, seed=4)
    network = network_of(FLOW, mixture(WEIGHTS, MEANS, STDS))
    noise = row_noise(key_b, 0, (2,))
    together = sample(FLOW, sampler, network, noise, grid, key_b).final
    alone = sample(FLOW, sampler, network, noise[3:4], grid, key_b[3:4]).final
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
    assert len(np.unique(np.asarray(together)[:, 0])) == 5


def test_states_on_the_way_are_kept():
    """The implied x0 of the steps asked for, in the order asked for; the last is the sample."""
    noise = row_noise(keys(3), 0, (2,))
    seen = []

    def network(x, told_b):
        jax.debug.callback(lambda x, t: seen.append((x, t)), x, told_b, ordered=True)
        return x + 1

    grid = time_grid(FLOW, 4)
    found = sample(FLOW, "euler", network, noise, grid, keep=(3, 0, 2))
    jax.effects_barrier()
    assert found.kept.shape == (3, 3, 2) and len(seen) == 4
    for row, step in enumerate((3, 0, 2)):
        x, told = seen[step]
        np.testing.assert_allclose(told, grid[step])
        # x0 = x - t v
        np.testing.assert_allclose(found.kept[row], x - told[0] * (x + 1), atol=1e-5)
    np.testing.assert_array_equal(found.kept[0], found.final)
    assert sample(FLOW, "euler", network, noise, grid).kept.shape == (0, 3, 2)


def test_clip_bounds_the_implied_data():
    """The bounded x0 and the noise that x_t then holds beside it; a wide bound changes nothing."""
    diffusion = EVERY["cosine_eps"]
    noise = row_noise(keys(4), 0, (3,))
    grid = np.float32([0.9, 0.4])
    network = lambda x, told_b: 5 * x
    found = sample(diffusion, "ddim", network, noise, grid, clip=2.0, keep=(0,))
    assert float(jnp.abs(found.kept).max()) == 2.0
    start = path(diffusion, jnp.float32(0.9), noise)
    x = start.b * noise
    x0 = found.kept[0]
    expected = add_noise(diffusion, x0, (x - start.a * x0) / start.b, jnp.full(4, 0.4))
    np.testing.assert_allclose(found.final, expected, atol=1e-5)
    wide, free = (
        sample(diffusion, "ddim", network, noise, grid, clip=clip).final for clip in (1e4, None)
    )
    np.testing.assert_allclose(wide, free, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_sampled_is_refused():
    run = lambda sampler, grid, **options: sample(
        FLOW, sampler, lambda x, t: x, jnp.zeros((1, 2)), np.float32(grid), **options
    )
    with pytest.raises(ValueError, match="'sde' draws noise: give a key"):
        run("sde", [1, 0])
    for grid in ([0, 1], [1, 1, 0], [1], [1, -1], [1, math.nan, 0]):
        with pytest.raises(ValueError, match="a grid of times falls"):
            run("euler", grid)
    with pytest.raises(ValueError, match="there are steps 0 to 1"):
        run("euler", [1, 0.5, 0], keep=(2,))


def labelled(x, time_b, labels_b):
    """Predicts by label: 3 is the null class. The last two channels are no prediction."""
    wanted = jnp.asarray([1.0, -2.0, 0.5, 0.0])[labels_b][:, None]
    return jnp.concatenate([x - wanted, wanted + 0 * x], axis=-1)


def test_guidance_by_hand():
    """Prediction x - wanted: guidance with w moves what is wanted to w times it; the rest stays."""
    x, time_b = row_noise(keys(3), 0, (2,)), jnp.asarray([0.2, 0.5, 0.8])
    labels, null = jnp.asarray([0, 1, 2]), jnp.full(3, 3)
    found = guided(labelled, labels, null, 3.0)(x, time_b)
    wanted = np.asarray([[1.0], [-2.0], [0.5]])
    np.testing.assert_allclose(found[:, :2], x - 3 * wanted, atol=1e-5)
    np.testing.assert_allclose(found[:, 2:], np.tile(wanted, (1, 2)))
    one = guided(labelled, labels, null, 3.0, channels=1)(x, time_b)
    np.testing.assert_allclose(one[:, 0], found[:, 0])
    np.testing.assert_allclose(one[:, 1], (x - wanted)[:, 1], atol=1e-6)
    between = guided(labelled, labels, null, 3.0, interval=(0.3, 0.8))(x, time_b)
    np.testing.assert_allclose(between[1:], found[1:])
    np.testing.assert_array_equal(between[0], labelled(x, time_b, labels)[0])
    assert guide(x, 2 * x, 0.0).tolist() == (2 * x).tolist()


def test_guidance_of_weight_1_is_the_conditional():
    """Bit for bit, also of a traced weight; the number 1 does not run the other branch."""
    rows = []

    def network(x, time_b, condition):
        rows.append(len(x))
        return jnp.tanh(labelled(x, time_b, condition["labels"]))

    x, time_b = row_noise(keys(3), 0, (2,)), jnp.full(3, 0.4)
    yes, no = {"labels": jnp.asarray([0, 1, 2])}, {"labels": jnp.full(3, 3)}
    plain = network(x, time_b, yes)
    traced = jax.jit(lambda weight: guided(network, yes, no, weight)(x, time_b))(1.0)
    np.testing.assert_array_equal(traced, plain)
    np.testing.assert_array_equal(guided(network, yes, no, 1.0)(x, time_b), plain)
    assert rows == [3, 6, 3]


def test_guidance_samples_a_sharper_class():
    """Two Gaussians of one width: guiding towards one multiplies its odds; exact in one step."""
    noise = row_noise(keys(6), 0, (2,))
    means = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])

    def network(x, told_b, labels_b):
        mean = means[labels_b]
        return target(FLOW, mean, (x - (1 - told_b[:, None]) * mean) / told_b[:, None], told_b)

    labels = jnp.asarray([0, 1, 0, 1, 0, 1])
    run = lambda weight: (
        sample(
            FLOW,
            "euler",
            guided(network, labels, jnp.full(6, 2), weight),
            noise,
            time_grid(FLOW, 1),
        ).final
    )
    np.testing.assert_allclose(run(2.5), 2.5 * means[labels], atol=1e-5)
    np.testing.assert_allclose(run(1.0), means[labels], atol=1e-5)
