"""Noising, predictions and losses of every process, against closed forms and plain loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.diffusion import Diffusion, DiffusionConfig, TimeSampling
from moejax.errors import UserError
from moejax.ops import diffusion

from .analytic import EDM_TIMES, EVERY

FLOW, DDPM = Diffusion("flow"), Diffusion("ddpm")
LINEAR = Diffusion("ddpm", schedule="linear")
LEARNED = Diffusion("ddpm", schedule="linear", learned_range=True)
EDM = Diffusion("edm", sigma_data=0.5, times=EDM_TIMES)


@pytest.fixture(params=EVERY)
def process(request):
    return EVERY[request.param]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def abar_by_hand(schedule):
    """abar_0..abar_1000 by the loops that the papers write."""

    def f(i):
        return math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    abar, values = 1.0, [1.0]
    for i in range(1, 1001):
        cosine = min(1 - f(i) / f(i - 1), 0.999)
        abar *= 1 - (cosine if schedule == "cosine" else 1e-4 + (i - 1) * (0.02 - 1e-4) / 999)
        values.append(abar)
    return np.array(values)


def test_time_zero_is_the_data_exactly(process):
    x0, eps = normal(0, 4, 3, 2), 1e3 * normal(1, 4, 3, 2)
    for t in (jnp.zeros(4), jnp.zeros((4, 3)), jnp.zeros(())):
        np.testing.assert_array_equal(diffusion.add_noise(process, x0, eps, t), x0)


@pytest.mark.parametrize("process", [FLOW, DDPM, LINEAR], ids=["flow", "cosine", "linear"])
def test_time_one_is_noise_of_unit_variance(process):
    x0, eps = 3.0 + normal(0, 1000, 1), normal(1, 1000, 1)
    noisy = diffusion.add_noise(process, x0, eps, jnp.ones(1000))
    # The schedules leave 5e-5 and 6e-3 of the data.
    atol = {"cosine": 4e-4, "linear": 0.05}[process.schedule]
    np.testing.assert_allclose(noisy, eps, atol=0 if process is FLOW else atol)


def test_coefficients():
    """The flow mixes by shares, DDPM keeps the variance, EDM adds sigma times the noise."""
    t = jnp.linspace(0, 1, 11)
    for process in (FLOW, DDPM, LINEAR, EDM):
        a, b, da, db = (np.asarray(x) for x in diffusion.path(process, t, t))
        if process is FLOW:
            np.testing.assert_allclose(a + b, 1, atol=1e-6)
        elif process is EDM:
            np.testing.assert_array_equal(a, 1)
            np.testing.assert_array_equal(b, t)
        else:
            np.testing.assert_allclose(a**2 + b**2, 1, atol=1e-6)
        # The slope in the process's own time, by finite differences between neighbours.
        if process.process != "ddpm":
            clock = np.asarray(diffusion.clock(process, t))
            np.testing.assert_allclose(np.gradient(a, clock), da, atol=1e-5)
            np.testing.assert_allclose(np.gradient(b, clock), db, atol=1e-5)
        else:
            angle = np.asarray(diffusion.clock(process, t))
            np.testing.assert_allclose(np.cos(angle), a, atol=1e-6)
            np.testing.assert_allclose(np.sin(angle), b, atol=1e-6)
            np.testing.assert_array_equal((da, db), (-b, a))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_against_the_loops(schedule):
    abar = abar_by_hand(schedule)
    signal, noise = diffusion.noise_schedule(schedule)
    np.testing.assert_allclose(signal**2, abar, rtol=1e-9)
    np.testing.assert_allclose(noise**2, 1 - abar, rtol=1e-9, atol=1e-12)
    # A time of the discrete process is the index over 1,000.
    t = jnp.asarray(np.arange(1001) / 1000, jnp.float32)
    process = Diffusion("ddpm", schedule=schedule)
    kept = diffusion.add_noise(process, jnp.ones(1001), jnp.zeros(1001), t)
    np.testing.assert_allclose(kept, np.sqrt(abar), rtol=1e-6)


def test_the_cosine_schedule_in_closed_form():
    abar = abar_by_hand("cosine")
    t = np.arange(1000) / 1000
    closed = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(abar[:-1], closed, rtol=1e-9)
    # The last beta is clipped.
    assert abar[-1] == pytest.approx(1e-3 * abar[-2], rel=1e-9)


def test_targets_by_hand():
    x0, eps, t = jnp.asarray([2.0]), jnp.asarray([-1.0]), jnp.asarray([0.25])
    a, b = np.sqrt(abar_by_hand("cosine")[250]), np.sqrt(1 - abar_by_hand("cosine")[250])
    found = lambda process, t=t: float(diffusion.target(process, x0, eps, t)[0])
    assert found(DDPM) == -1
    assert found(Diffusion("ddpm", prediction="x0")) == 2
    assert found(Diffusion("ddpm", prediction="velocity")) == pytest.approx(-a - 2 * b, rel=1e-6)
    assert found(FLOW) == -3
    assert found(Diffusion("flow", direction="to_data")) == 3
    assert found(Diffusion("flow", prediction="x0", direction="to_data")) == 2
    # sigma 1.2 and sigma_data 0.5: c_skip = 0.25 / 1.69, c_out = 0.6 / 1.3.
    x_t = 2 - 1.2
    expected = (2 - 0.25 / 1.69 * x_t) / (0.6 / 1.3)
    assert found(EDM, jnp.asarray([1.2])) == pytest.approx(expected, rel=1e-6)


def test_flow_target_is_the_derivative_in_time():
    """Of the network's time, whichever way it runs."""
    x0, eps = normal(0, 6, 2), normal(1, 6, 2)
    t = jnp.linspace(0.1, 0.9, 6)
    for process in (FLOW, EVERY["flow_to_data"]):
        _, told = diffusion.network_input(process, x0, t)
        back = (lambda u: u) if process is FLOW else (lambda u: 1 - u)
        noisy = lambda u, process=process, back=back: diffusion.add_noise(process, x0, eps, back(u))
        _, slope = jax.jvp(noisy, (told,), (jnp.ones(6),))
        np.testing.assert_allclose(slope, diffusion.target(process, x0, eps, t), rtol=1e-5)


def test_what_the_network_reads():
    x, t = normal(0, 3, 2), jnp.asarray([0.1, 0.5, 2.0])
    for process, told in ((DDPM, t), (FLOW, t), (EVERY["flow_to_data"], 1 - t)):
        seen, number = diffusion.network_input(process, x, t)
        np.testing.assert_array_equal(seen, x)
        np.testing.assert_array_equal(number, told)
    seen, number = diffusion.network_input(EDM, x, t)
    np.testing.assert_allclose(seen, x / np.sqrt(np.asarray(t)[:, None] ** 2 + 0.25), rtol=1e-6)
    np.testing.assert_allclose(number, np.log(t) / 4, rtol=1e-6)


def test_the_true_prediction_implies_the_data_and_the_noise(process):
    t = jnp.asarray([0.013, 0.25, 0.5, 0.9, 0.99])
    x0, eps = normal(0, 5, 4, 3), normal(1, 5, 4, 3)
    x_t = diffusion.add_noise(process, x0, eps, t)
    prediction = diffusion.target(process, x0, eps, t)
    # What a network says beside its prediction is not read.
    output = jnp.concatenate([prediction, 99 + 0 * prediction], axis=-1)
    found = diffusion.implied(process, x_t, output, t)
    np.testing.assert_allclose(found[0], x0, atol=1e-4)
    np.testing.assert_allclose(found[1], eps, atol=1e-4)


def test_edm_is_the_papers():
    """c_skip, c_out, c_in, c_noise and lambda of table 1, at noise levels from end to end."""
    data = 0.5
    x0, eps, raw = data * normal(0, 4, 3), normal(1, 4, 3), normal(2, 4, 3)
    sigma = np.asarray([[0.002], [0.3], [1.7], [80.0]], np.float64)
    t = jnp.asarray(sigma[:, 0], jnp.float32)
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / np.sqrt(sigma**2 + data**2)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    x_t = diffusion.add_noise(EDM, x0, eps, t)
    np.testing.assert_allclose(x_t, x0 + sigma * eps, rtol=1e-5)
    denoised = skip * x_t + out * raw
    found_x0, found_eps = diffusion.implied(EDM, x_t, raw, t)
    np.testing.assert_allclose(found_x0, denoised, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x_t - sigma * found_eps, denoised, rtol=1e-4, atol=1e-4)
    # In float64: at the smallest sigma D and x0 differ in their last digits.
    exact = [np.asarray(x, np.float64) for x in (x0, eps, raw)]
    noisy = exact[0] + sigma * exact[1]
    error = weight * np.square(skip * noisy + out * exact[2] - exact[0])
    found = diffusion.losses(EDM, raw, x0, eps, t)["error"]
    np.testing.assert_allclose(found, error.mean(axis=1), rtol=1e-4)


def test_losses_are_means_of_squares():
    """Of every process; channels beyond the data's do not count where no range is learned."""
    x0, eps = normal(0, 3, 2, 2, 4), normal(1, 3, 2, 2, 4)
    t = jnp.asarray([0.2, 0.5, 0.9])
    for process in EVERY.values():
        off = jnp.asarray([0.5, -1.0, 2.0]).reshape(3, 1, 1, 1)
        output = diffusion.target(process, x0, eps, t) + off
        found = diffusion.losses(process, jnp.concatenate([output, 7 * output], -1), x0, eps, t)
        assert list(found) == ["error"]
        np.testing.assert_allclose(found["error"], [0.25, 1, 4], rtol=1e-4)
    with pytest.raises(ValueError, match="an output of 4 channels for data of 4, and as many"):
        diffusion.losses(LEARNED, x0, x0, eps, t)


def normal_divergence(mean, variance, other_mean, other_variance):
    """In nats."""
    ratio = variance / other_variance
    return 0.5 * (ratio - 1 - np.log(ratio) + np.square(mean - other_mean) / other_variance)


def test_variational_bound_against_the_papers_formulas():
    """A divergence at steps above 1: equations 6, 7 and 10 of DDPM, 15 of the improved one."""
    abar = abar_by_hand("linear")
    index = np.array([2, 40, 500, 1000])
    alpha = (abar[index] / abar[index - 1])[:, None]
    at, before = abar[index][:, None], abar[index - 1][:, None]
    beta = 1 - alpha
    posterior = (1 - before) / (1 - at) * beta
    x0, eps, guess, v = (np.asarray(normal(seed, 4, 3), np.float64) for seed in range(4))
    x_t = np.sqrt(at) * x0 + np.sqrt(1 - at) * eps
    true_mean = np.sqrt(before) * beta / (1 - at) * x0
    true_mean = true_mean + np.sqrt(alpha) * (1 - before) / (1 - at) * x_t
    mean = (x_t - beta / np.sqrt(1 - at) * guess) / np.sqrt(alpha)
    variance = np.exp((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(posterior))
    expected = normal_divergence(true_mean, posterior, mean, variance) / np.log(2)
    output = jnp.asarray(np.concatenate([guess, v], axis=1), jnp.float32)
    arguments = (*(jnp.float32(x) for x in (x0, eps)), jnp.asarray(index / 1000, jnp.float32))
    found = diffusion.variational_bound(LEARNED, output, *arguments)
    np.testing.assert_allclose(found, expected, rtol=5e-4)
    bound = diffusion.losses(LEARNED, output, *arguments)["bound"]
    np.testing.assert_allclose(bound, expected.mean(axis=1), rtol=5e-4)


def test_the_first_step_is_a_code_length():
    """All bins of a picture's values have probability 1 together; the length by a fine sum."""
    values = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    log_probability = lambda mean, std: diffusion._log_bin_probability(
        values, jnp.float32(mean), jnp.float32(std)
    )
    for mean, std in ((0.1, 0.01), (-0.99, 0.03), (0.7, 0.2)):
        assert float(jnp.exp(log_probability(mean, std)).sum()) == pytest.approx(1, abs=1e-4)
    # beta_1 = 1e-4, v = 1: a standard deviation of 0.01 around x0, which eps says rightly.
    t = jnp.full(2, 0.001)
    x0, eps = values[jnp.asarray([[100], [7]])], normal(0, 2, 1)
    output = jnp.concatenate([eps, jnp.ones((2, 1))], axis=1)
    found = diffusion.variational_bound(LEARNED, output, x0, eps, t)
    inside = math.erf(1 / 255 / 0.01 / math.sqrt(2))
    np.testing.assert_allclose(found, -math.log2(inside), rtol=0.01)


def test_the_bound_trains_the_variance_alone():
    """Its gradient is 0 in the prediction, and 0 in v where v says the variance rightly."""
    t = jnp.asarray([0.3, 0.001, 0.9])
    x0, eps = jnp.tanh(normal(0, 3, 4)), normal(1, 3, 4)

    def total(prediction, v, name):
        output = jnp.concatenate([prediction, v], axis=-1)
        return diffusion.losses(LEARNED, output, x0, eps, t)[name].sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    v = 0.3 * normal(2, 3, 4)
    for name, trains in (("error", (True, False)), ("bound", (False, True))):
        for part, does in zip(gradient(0.9 * eps, v, name), trains, strict=True):
            assert np.isfinite(part).all() and bool((np.asarray(part) != 0).all()) == does
    # With the true mean the best variance is the smaller bound: v = -1, above the first step.
    _, at_best = gradient(eps, jnp.full((3, 4), -1.0), "bound")
    np.testing.assert_allclose(at_best[::2], 0, atol=1e-6)


def test_each_token_may_have_a_time_of_its_own(process):
    x0, eps = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    t = jnp.asarray([[0.0, 0.4, 1.0], [0.2, 0.0, 0.7]])
    together = diffusion.add_noise(process, x0, eps, t)
    wanted = diffusion.target(process, x0, eps, t)
    for b in range(2):
        for i in range(3):
            arguments = (process, x0[b, i], eps[b, i], t[b, i])
            np.testing.assert_allclose(together[b, i], diffusion.add_noise(*arguments), rtol=1e-5)
            np.testing.assert_allclose(wanted[b, i], diffusion.target(*arguments), rtol=1e-5)


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
    """As the training step calls it: traced times, compiled."""

    @jax.jit
    def run(x0, eps, t):
        x_t = diffusion.add_noise(process, x0, eps, t)
        wanted = diffusion.target(process, x0, eps, t)
        return x_t, wanted, *diffusion.implied(process, x_t, wanted, t)

    x0, eps, t = normal(0, 2, 3, 4), normal(1, 2, 3, 4), jnp.full((2, 3), 0.6)
    for value in run(x0, eps, t):
        assert value.shape == x0.shape and value.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (x0, eps)]
        assert {value.dtype for value in run(*wide, t)} == {jnp.dtype("float64")}


EDM_FIELDS = {"process": "edm", "times": EDM_TIMES}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"process": "dppm"}, "objective.process: 'dppm' is none of flow, ddpm, edm"),
        ({"prediction": "eps"}, "objective.prediction: 'eps' is none of velocity, x0"),
        ({"schedule": "linear"}, "objective.schedule: is of process 'ddpm'; leave it cosine"),
        ({"learned_range": True}, "objective.learned_range: is of process 'ddpm'"),
        ({"process": "ddpm", "direction": "to_data"}, "objective.direction: is of process 'flow'"),
        ({"process": "edm"}, "objective.times.distribution: 'uniform' is none of log_normal"),
        ({"times": EDM_TIMES}, "objective.times.distribution: 'log_normal' is none of uniform"),
        ({**EDM_FIELDS, "sigma_min": 90.0}, "objective.sigma_min: need 0 < sigma_min < sigma_max"),
        ({**EDM_FIELDS, "sigma_data": 0.0}, "objective.sigma_data: must be positive, got 0.0"),
        ({"sigma_data": 1.0}, "objective.sigma_data: is of process 'edm'; leave it 0.5"),
        ({"sigma_min": 0.1}, "objective.sigma_min: is of process 'edm'; leave it 0.002"),
        ({"process": "ddpm", "sigma_max": 1.0}, "objective.sigma_max: is of process 'edm'"),
        (
            {"process": "edm", "times": TimeSampling("log_normal", shift=2.0)},
            "objective.times.shift: leave it 1",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(fields, message):
    for kind in (Diffusion, DiffusionConfig):
        with pytest.raises(UserError, match=message):
            kind(**fields)


def test_unknown_distribution():
    with pytest.raises(UserError, match="objective.times.distribution: 'cauchy' is none of"):
        TimeSampling("cauchy")
    with pytest.raises(UserError, match="objective.times.std: must be positive"):
        TimeSampling(std=0.0)
    for name, default in (("mean", "0.0"), ("std", "1.0")):
        message = f"objective.times.{name}: has no effect on 'uniform'; leave it {default}"
        with pytest.raises(UserError, match=message):
            TimeSampling(**{name: 0.5})
