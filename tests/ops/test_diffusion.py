"""Noising, targets, time and samplers of both processes, against closed forms and plain loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.ops import diffusion
from moejax.ops.diffusion import TimeSampling

NAMES = ("ddpm", "flow")


@pytest.fixture(params=NAMES)
def process(request):
    return request.param


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def cosine_by_hand():
    """abar_0..abar_1000 by the loop that the paper writes."""

    def f(i):
        return math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    abar, values = 1.0, [1.0]
    for i in range(1, 1001):
        abar *= 1 - min(1 - f(i) / f(i - 1), 0.999)
        values.append(abar)
    return np.array(values)


def test_both_processes_are_registered():
    assert tuple(diffusion.PROCESSES) == NAMES
    with pytest.raises(UserError, match="no diffusion process 'dppm'.*ddpm"):
        diffusion.target("dppm", jnp.zeros(1), jnp.zeros(1))


def test_time_zero_is_the_data_exactly(process):
    x0, eps = normal(0, 4, 3, 2), 1e3 * normal(1, 4, 3, 2)
    for t in (jnp.zeros(4), jnp.zeros((4, 3)), jnp.zeros(())):
        np.testing.assert_array_equal(diffusion.add_noise(process, x0, eps, t), x0)


def test_time_one_is_noise_of_unit_variance(process):
    count = 100_000
    x0, eps = 3.0 + normal(0, count, 1), normal(1, count, 1)
    noisy = np.asarray(diffusion.add_noise(process, x0, eps, jnp.ones(count)), np.float64)
    # Three standard errors of a mean and of a variance; the schedule leaves 5e-5 of the data.
    assert abs(noisy.mean()) < 3 / math.sqrt(count) + 2e-4
    assert abs(noisy.var() - 1) < 3 * math.sqrt(2 / count) + 1e-3
    np.testing.assert_allclose(noisy, eps, atol=4e-4)


def test_variance_is_kept_on_the_way_by_ddpm_only():
    t = jnp.linspace(0, 1, 11)
    one, zero = jnp.ones(11), jnp.zeros(11)
    for name in NAMES:
        a = np.asarray(diffusion.add_noise(name, one, zero, t))
        b = np.asarray(diffusion.add_noise(name, zero, one, t))
        if name == "ddpm":
            np.testing.assert_allclose(a**2 + b**2, 1, atol=1e-6)
        else:
            np.testing.assert_allclose(a + b, 1, atol=1e-6)


def test_cosine_schedule_against_the_loop():
    abar = cosine_by_hand()
    signal, noise = diffusion.cosine_schedule()
    np.testing.assert_allclose(signal**2, abar, rtol=1e-9)
    np.testing.assert_allclose(noise**2, 1 - abar, rtol=1e-9)
    # The closed form holds until the last beta, which is clipped.
    t = np.arange(1000) / 1000
    closed = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(abar[:-1], closed, rtol=1e-9)
    assert abar[-1] == pytest.approx(1e-3 * abar[-2], rel=1e-9)


def test_ddpm_time_is_the_index_over_1000():
    index = np.arange(0, 1001)
    t = jnp.asarray(index / 1000, jnp.float32)
    kept = diffusion.add_noise("ddpm", jnp.ones(1001), jnp.zeros(1001), t)
    np.testing.assert_allclose(kept, np.sqrt(cosine_by_hand()), rtol=1e-6)


def test_targets(process):
    x0, eps = normal(0, 5), normal(1, 5)
    expected = eps if process == "ddpm" else eps - x0
    np.testing.assert_array_equal(diffusion.target(process, x0, eps), expected)


def test_flow_target_is_the_derivative_in_time():
    x0, eps = normal(0, 6, 2), normal(1, 6, 2)
    t = jnp.linspace(0.1, 0.9, 6)
    noisy = lambda t: diffusion.add_noise("flow", x0, eps, t)
    _, slope = jax.jvp(noisy, (t,), (jnp.ones(6),))
    np.testing.assert_allclose(slope, diffusion.target("flow", x0, eps), rtol=1e-6)


def test_predict_x0_inverts_the_noising(process):
    t = jnp.asarray([0.0, 0.013, 0.25, 0.5, 0.9, 0.99])
    x0, eps = normal(0, 6, 4, 3), normal(1, 6, 4, 3)
    noisy = diffusion.add_noise(process, x0, eps, t)
    prediction = diffusion.target(process, x0, eps)
    found = diffusion.predict_x0(process, noisy, prediction, t)
    np.testing.assert_allclose(found, x0, atol=1e-4)


def test_each_token_may_have_a_time_of_its_own(process):
    x0, eps = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    t = jnp.asarray([[0.0, 0.4, 1.0], [0.2, 0.0, 0.7]])
    together = diffusion.add_noise(process, x0, eps, t)
    for b in range(2):
        for i in range(3):
            alone = diffusion.add_noise(process, x0[b, i], eps[b, i], t[b, i])
            np.testing.assert_allclose(together[b, i], alone, rtol=1e-6)


@pytest.mark.parametrize("noisy_step", [False, True])
def test_a_step_to_zero_with_the_true_prediction_is_the_data(process, noisy_step):
    t = jnp.asarray([0.001, 0.04, 0.5, 0.96])
    x0, eps = normal(0, 4, 3), normal(1, 4, 3)
    x_t = diffusion.add_noise(process, x0, eps, t)
    noise = normal(2, 4, 3) if noisy_step else None
    prediction = diffusion.target(process, x0, eps)
    found = diffusion.step(process, x_t, prediction, t, jnp.zeros(4), noise)
    np.testing.assert_allclose(found, x0, atol=1e-4)


def test_a_deterministic_step_stays_on_the_path(process):
    """With the true prediction, the step from t to s is the noising at s with the same noise."""
    t, s = jnp.asarray([1.0, 0.8, 0.3]), jnp.asarray([0.96, 0.1, 0.299])
    x0, eps = normal(0, 3, 5), normal(1, 3, 5)
    x_t = diffusion.add_noise(process, x0, eps, t)
    found = diffusion.step(process, x_t, diffusion.target(process, x0, eps), t, s)
    np.testing.assert_allclose(found, diffusion.add_noise(process, x0, eps, s), atol=1e-4)


def test_the_flow_step_is_eulers():
    x, velocity = normal(0, 3, 5), normal(1, 3, 5)
    t, s = jnp.asarray([1.0, 0.8, 0.3]), jnp.asarray([0.5, 0.1, 0.0])
    found = diffusion.step("flow", x, velocity, t, s)
    np.testing.assert_allclose(found, x + (s - t)[:, None] * velocity, atol=1e-6)


def test_the_ddpm_step_is_the_papers():
    """Mean and variance of each single step as equations 7 and 11 of the DDPM paper write them."""
    abar = cosine_by_hand()
    index = np.array([2, 40, 500, 960])
    alpha = abar[index] / abar[index - 1]
    beta = 1 - alpha
    x, eps, noise = (np.asarray(normal(seed, 4, 3), np.float64) for seed in range(3))
    mean = (x - (beta / np.sqrt(1 - abar[index]))[:, None] * eps) / np.sqrt(alpha)[:, None]
    std = np.sqrt((1 - abar[index - 1]) / (1 - abar[index]) * beta)[:, None]
    t, s = (jnp.asarray(i / 1000, jnp.float32) for i in (index, index - 1))
    found = diffusion.step("ddpm", *map(jnp.float32, (x, eps)), t, s, jnp.float32(noise))
    np.testing.assert_allclose(found, mean + std * noise, rtol=2e-4, atol=2e-4)


def test_clip_bounds_the_implied_data(process):
    x, wrong = normal(0, 3, 5), 100 * normal(1, 3, 5)
    t = jnp.asarray([0.3, 0.7, 1.0])
    found = diffusion.step(process, x, wrong, t, jnp.zeros(3), clip=2.0)
    assert float(jnp.abs(found).max()) == 2.0
    # The noise is that which x_t holds beside the bounded data.
    x0 = jnp.clip(diffusion.predict_x0(process, x, wrong, t), -2, 2)
    a = diffusion.add_noise(process, jnp.ones((3, 1)), jnp.zeros((3, 1)), t)
    b = diffusion.add_noise(process, jnp.zeros((3, 1)), jnp.ones((3, 1)), t)
    expected = diffusion.add_noise(process, x0, (x - a * x0) / b, 0.5 * t)
    found = diffusion.step(process, x, wrong, t, 0.5 * t, clip=2.0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # A bound that does not bind changes nothing.
    x0 = jnp.clip(normal(2, 3, 5), -1, 1)
    x_t = diffusion.add_noise(process, x0, x, 0.9 * t)
    right = diffusion.target(process, x0, x)
    arguments = (process, x_t, right, 0.9 * t, 0.4 * t)
    np.testing.assert_allclose(
        diffusion.step(*arguments, clip=2.0), diffusion.step(*arguments), atol=1e-4
    )


MEAN, STD = 1.5, 0.5


def gaussian_prediction(process, x_t, t):
    """The best prediction for data of N(MEAN, STD^2), in closed form."""
    a = float(diffusion.add_noise(process, jnp.ones(()), jnp.zeros(()), t))
    b = float(diffusion.add_noise(process, jnp.zeros(()), jnp.ones(()), t))
    surprise = (x_t - a * MEAN) / (a**2 * STD**2 + b**2)
    x0 = MEAN + a * STD**2 * surprise
    return diffusion.target(process, x0, b * surprise)


def sample_gaussian(process, steps, ancestral=False):
    """(mean, std) of the samples."""
    keys = jax.random.split(jax.random.key(0), steps + 1)
    x = jax.random.normal(keys[0], (20_000,))
    grid = diffusion.time_grid(process, steps)
    for key, t, s in zip(keys[1:], grid[:-1], grid[1:], strict=True):
        noise = jax.random.normal(key, x.shape) if ancestral else None
        prediction = gaussian_prediction(process, x, jnp.asarray(t))
        x = diffusion.step(process, x, prediction, jnp.asarray(t), jnp.asarray(s), noise)
    return float(x.mean()), float(x.std())


@pytest.mark.parametrize("steps", [25, 100])
@pytest.mark.parametrize(
    ("name", "ancestral"), [("ddpm", False), ("ddpm", True), ("flow", False), ("flow", True)]
)
def test_samplers_recover_a_gaussian(name, ancestral, steps):
    """The exact denoiser leaves only the error of the steps, which falls as 1 / steps."""
    mean, std = sample_gaussian(name, steps, ancestral)
    # The sampling error of 20,000 draws is 0.004 at most.
    assert mean == pytest.approx(MEAN, abs=0.012)
    assert std == pytest.approx(STD, abs=0.01 + 3 / steps * STD)


def test_time_grid():
    for name in NAMES:
        for steps in (1, 25, 250, 1000):
            grid = diffusion.time_grid(name, steps)
            assert grid.shape == (steps + 1,) and grid.dtype == np.float32
            assert grid[0] == 1 and grid[-1] == 0 and np.all(np.diff(grid) < 0)
    np.testing.assert_array_equal(
        diffusion.time_grid("ddpm", 4), np.float32([1, 0.75, 0.5, 0.25, 0])
    )
    # Seven steps do not divide 1,000: each time is one of the thousand.
    np.testing.assert_allclose(
        diffusion.time_grid("ddpm", 7), [1, 0.857, 0.714, 0.571, 0.429, 0.286, 0.143, 0], rtol=1e-6
    )
    shifted = diffusion.time_grid("flow", 4, shift=3.0)
    np.testing.assert_allclose(shifted, [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="ddpm has 1000 discrete times"):
        diffusion.time_grid("ddpm", 1001)


def test_ddpm_times_are_uniform_over_the_steps():
    count = 200_000
    t = np.asarray(diffusion.sample_times("ddpm", jax.random.key(0), (count,)), np.float64)
    index = np.rint(t * 1000).astype(int)
    np.testing.assert_allclose(t, index / 1000, rtol=1e-6)
    counts = np.bincount(index, minlength=1001)
    assert counts[0] == 0 and len(counts) == 1001
    # Six standard deviations of a count of 200.
    assert np.abs(counts[1:] - 200).max() < 6 * math.sqrt(200)


def test_flow_times_are_uniform():
    t = np.asarray(diffusion.sample_times("flow", jax.random.key(0), (400, 250)))
    assert t.shape == (400, 250) and t.dtype == np.float32
    assert t.min() > 0 and t.max() <= 1
    counts = np.histogram(t, bins=10, range=(0, 1))[0]
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


def test_logit_normal_times(process):
    options = TimeSampling("logit_normal", mean=-0.5, std=1.2)
    t = np.asarray(diffusion.sample_times(process, jax.random.key(0), (100_000,), options))
    # For "ddpm" rounded up to the next thousandth, which moves the quantiles by half of one.
    expected = [1 / (1 + math.exp(0.5 - 1.2 * z)) for z in (-1.0, 0.0, 1.0)]
    np.testing.assert_allclose(np.quantile(t, [0.158655, 0.5, 0.841345]), expected, atol=0.01)


def test_shift_moves_every_time(process):
    key = jax.random.key(0)
    plain = np.asarray(diffusion.sample_times(process, key, (1000,)), np.float64)
    shifted = diffusion.sample_times(process, key, (1000,), TimeSampling(shift=3.0))
    np.testing.assert_allclose(shifted, 3 * plain / (1 + 2 * plain), atol=0.004)


def test_largest_time_of_each_picture(process):
    limit = jnp.asarray([[1.0], [0.5], [0.001]])
    t = diffusion.sample_times(process, jax.random.key(0), (3, 20_000), max_time=limit)
    largest = np.asarray(t).max(axis=1)
    np.testing.assert_allclose(largest, [1, 0.5, 0.001], rtol=0.01)
    assert np.asarray(t).min() > 0
    np.testing.assert_allclose(np.asarray(t)[1].mean(), 0.25, atol=0.005)


def test_unknown_distribution():
    with pytest.raises(UserError, match="objective.times.distribution: 'cauchy' is none of"):
        TimeSampling("cauchy")


def test_timestep_embedding_by_hand():
    t = jnp.asarray([[0.0, 0.25, 1.0]])
    found = diffusion.timestep_embedding(t, 7)
    assert found.shape == (1, 3, 7) and found.dtype == jnp.float32
    for column, time in enumerate((0.0, 0.25, 1.0)):
        frequencies = [10_000 ** (-i / 3) for i in range(3)]
        angles = [1000 * time * frequency for frequency in frequencies]
        expected = [*map(math.cos, angles), *map(math.sin, angles), 0.0]
        np.testing.assert_allclose(found[0, column], expected, atol=1e-4)


def test_under_jit_and_in_the_latents_dtype(process):
    """As the training step and the sampling loop call it: traced times, compiled."""

    @jax.jit
    def run(x0, eps, t, s):
        x_t = diffusion.add_noise(process, x0, eps, t)
        found = diffusion.step(process, x_t, diffusion.target(process, x0, eps), t, s, eps)
        return found, diffusion.predict_x0(process, x_t, eps, t)

    x0, eps = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    t, s = jnp.full((2, 3), 0.6), jnp.full((2, 3), 0.2)
    for value in run(x0, eps, t, s):
        assert value.shape == x0.shape and value.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (x0, eps)]
        assert {value.dtype for value in run(*wide, t, s)} == {jnp.dtype("float64")}
