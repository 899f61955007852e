"""Drawings from packages to pictures, and which of them look alike."""

import io

import numpy as np
import pytest
from PIL import Image

from moejax.data.prepare.drawings import (
    is_blank,
    lay_on_white,
    plain_points,
    rasterise,
    slug,
    svg_of,
)
from moejax.data.prepare.look_alikes import look_alikes

BODY = '<rect width="{}" height="{}" fill="#f00"/>'
ICONS = {
    "width": 20,
    "height": 20,
    "icons": {
        "left-half": {"body": BODY.format(10, 20)},
        "tall": {"body": BODY.format(10, 20), "width": 10},
        "moved": {"body": '<rect x="-5" width="10" height="20" fill="#f00"/>', "left": -5},
    },
    "aliases": {
        "right-half": {"parent": "left-half", "hFlip": True},
        "other-name": {"parent": "right-half"},
        "left-again": {"parent": "right-half", "hFlip": True},
        "moved-right": {"parent": "moved", "hFlip": True},
        "turned": {"parent": "left-half", "rotate": 1},
    },
}


def red_columns(name):
    pytest.importorskip("resvg_py", reason="resvg-py is not installed")
    picture = lay_on_white(rasterise(svg_of(ICONS, name)))
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    red = (picture == [255, 0, 0]).all(-1)
    assert (red | (picture == 255).all(-1)).all(), "nothing but red and white"
    assert (red == red[:1]).all(), "the same in all rows"
    return np.flatnonzero(red[0]).tolist()


@pytest.mark.parametrize(
    "name, columns",
    [
        ("left-half", range(16)),
        ("right-half", range(16, 32)),
        ("other-name", range(16, 32)),
        ("left-again", range(16)),
        ("tall", range(8, 24)),  # Put in the middle of a square.
        ("moved", range(16)),
        ("moved-right", range(16, 32)),
    ],
)
def test_icons_and_aliases(name, columns):
    assert red_columns(name) == list(columns)


def test_an_icon_that_is_not_there_or_turned():
    assert svg_of(ICONS, "nothing") is None
    with pytest.raises(ValueError, match="another one turned"):
        svg_of(ICONS, "turned")


def test_transparency_is_white_and_2x2_pixels_are_averaged():
    drawing = np.zeros((64, 64, 4), np.uint8)
    drawing[:, 32:, 3] = 255
    drawing[:, 1::2, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(drawing).save(buffer, format="PNG")
    picture = lay_on_white(buffer.getvalue())
    assert (picture[:, :16] == 128).all() and (picture[:, 16:] == 0).all()
    Image.fromarray(drawing[:60]).save(buffer := io.BytesIO(), format="PNG")
    with pytest.raises(ValueError, match="the size"):
        lay_on_white(buffer.getvalue())


def test_blank_pictures():
    assert is_blank(np.full((32, 32, 3), 255, np.uint8))
    faint = np.full((32, 32, 3), 250, np.uint8)
    faint[8:24, 8:24] = 255
    assert is_blank(faint)
    drawn = faint.copy()
    drawn[10:20, 10:12] = 0
    assert not is_blank(drawn)


def test_names_of_icons_and_points():
    assert slug("flag: Åland Islands") == "flag-aland-islands"
    assert slug("flag: Antigua & Barbuda") == "flag-antigua-and-barbuda"
    assert slug("Japanese “vacancy” button") == "japanese-vacancy-button"
    assert plain_points("0023-fe0f-20e3") == plain_points("0023-20E3") == "23-20E3"


def test_look_alikes():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
    pictures[1] = pictures[0][:, ::-1]  # A mirror image.
    pictures[3] = np.clip(pictures[2].astype(int) + 2, 0, 255)  # 2 of 255 brighter.
    pictures[5] = np.clip(pictures[4].astype(int) + 20, 0, 255)
    features = np.eye(6, dtype=np.float32)
    groups = ["a", "b", "a", "b", "a", "b"]
    assert look_alikes(pictures, features, features, groups) == {(0, 1), (2, 3)}
    assert look_alikes(pictures, features, features, ["a"] * 6) == set()
    # By their features alone: 5 like 4, and 3 in a mirror like 0.
    features[5] = [0, 0, 0, 0, 0.99, np.sqrt(1 - 0.99**2)]
    mirrored = np.eye(6, dtype=np.float32)
    mirrored[3] = [0.99, 0, 0, np.sqrt(1 - 0.99**2), 0, 0]
    assert look_alikes(pictures, features, mirrored, groups) == {(0, 1), (2, 3), (4, 5), (0, 3)}
    features[5] = [0, 0, 0, 0, 0.97, np.sqrt(1 - 0.97**2)]
    assert look_alikes(pictures, features, np.eye(6), groups) == {(0, 1), (2, 3)}
