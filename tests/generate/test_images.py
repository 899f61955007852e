"""Distances to training pictures, and the grid: its size, its words, and how it is written."""

import numpy as np
import pytest
from PIL import Image

from moejax.generate.images import (
    GridRow,
    Tile,
    draw_grid,
    drawable,
    nearest_images,
    save_png,
    wrap,
)


def flat(value: int, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def test_nearest_image_and_its_distance_by_hand():
    train = np.stack([flat(0), flat(100), flat(250)])
    half = flat(100)
    half[:4] = 110
    index, distance = nearest_images(np.stack([flat(93), flat(250), half]), train)
    np.testing.assert_array_equal(index, [1, 2, 1])
    # Half of the numbers are off by 10: the root of 50.
    np.testing.assert_allclose(distance, [7, 0, 50**0.5], atol=1e-12)


def test_nearest_image_is_found_in_a_set_of_many_parts():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (2500, 4, 4, 3)).astype(np.uint8)
    wanted = np.array([0, 1023, 1024, 2499])
    index, distance = nearest_images(train[wanted], train)
    np.testing.assert_array_equal(index, wanted)
    np.testing.assert_array_equal(distance, 0)


def test_grid_has_the_size_of_its_rows_and_shows_the_pictures():
    tiles = [Tile(flat(200), "real"), Tile(flat(50, 32), "a label of two lines or more")]
    rows = [GridRow("a title", "a note", tiles), GridRow("another", "", tiles * 2)]
    grid = draw_grid(rows, "header", columns=3)
    # Title of 190, three tiles of 96, gaps of 10; three lines of 96 with two lines of label.
    assert grid.size == (10 + 200 + 3 * 106, 36 + 3 * (96 + 32 + 10))
    pixels = np.asarray(grid)
    assert (pixels[36 + 50, 210 + 50] == 200).all()
    assert (pixels[36 + 50, 210 + 106 + 50] == 50).all()
    assert (pixels[36 + 50, 210 + 212 + 50] == 255).all()
    assert (pixels[36 + 2 * 138 + 50, 210 + 50] == 50).all()


def test_panels_lie_side_by_side():
    rows = [GridRow(f"row {i}", "", [Tile(flat(10 * i))]) for i in range(1, 4)]
    one, two = (draw_grid(rows, "header", columns=1, panels=panels) for panels in (1, 2))
    assert two.size == (2 * one.width, one.height - (96 + 10))
    pixels = np.asarray(two)
    assert (pixels[36 + 50, one.width + 250] == 30).all()


def test_a_large_picture_is_shrunk_and_a_grid_without_titles_has_no_column_for_them():
    grid = draw_grid([GridRow("", "", [Tile(flat(7, 300))])], "", columns=4)
    assert grid.size == (10 + 106, 20 + 96 + 10)
    assert (np.asarray(grid)[20:116, 10:106] == 7).all()


def test_words_change_the_picture():
    def grid(title="t", note="n", label="l", header="h"):
        rows = [GridRow(title, note, [Tile(flat(0), label)])]
        return np.asarray(draw_grid(rows, header, columns=1))

    for change in ({"title": "x"}, {"note": "x"}, {"label": "x"}, {"header": "x"}):
        assert (grid() != grid(**change)).any(), change


def test_text_that_the_font_lacks_is_replaced():
    assert drawable("red apple: 3") == "red apple: 3"
    assert drawable("Äpfel à la crème") == "Apfel a la creme"
    assert drawable("लाल सेब", "red apple") == "red apple"
    assert drawable("赤いりんご", "red apple") == "red apple"
    assert drawable("half\ufffd") == "half?"


def test_lines_are_wrapped_and_cut_off():
    text = "one two three four five six seven eight nine ten eleven twelve"
    lines = wrap(text, 100, lines=50)
    assert len(lines) > 2
    assert " ".join(lines) == text
    assert wrap(text, 100, lines=2)[0] == lines[0]
    assert wrap(text, 100, lines=2)[1].endswith("...")
    assert "".join(wrap("x" * 90, 100, lines=50)) == "x" * 90
    assert wrap("", 100, lines=3) == []


def test_png_is_written_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / "samples" / "grid.png"
    save_png(Image.new("RGB", (3, 2), "red"), path)
    assert Image.open(path).size == (3, 2)
    before = path.read_bytes()

    def break_off(self, file, format):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
