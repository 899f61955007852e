"""``train.profile_steps``: a trace of a real run, and the time by scope that is read from it."""

import jax
import pytest

from moejax.analysis.trace import PROGRAM, scope_times
from moejax.train.loop import train

from .conftest import make_config


@pytest.fixture
def settings():
    """Profiling makes names count in the key of the compilation cache; other tests need not."""
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


def test_profile_has_the_scopes_of_the_step(fake_data, settings, tmp_path, capsys):
    config = make_config(train__steps=6, train__profile_start=2, train__profile_steps=2)
    train(config, tmp_path / "run")
    folder = tmp_path / "run" / "profile"
    assert f"profile of steps 3 to 4: {folder}" in capsys.readouterr().out
    assert len(list(folder.rglob("*.xplane.pb"))) == 1
    assert (folder / PROGRAM).read_text().startswith("HloModule jit_step")
    times = scope_times(tmp_path / "run")
    assert {"objective", "backward objective", "optimizer"} <= set(times)
    assert all(ms > 0 for ms in times.values())


def test_no_profile_by_default(fake_data, tmp_path):
    train(make_config(train__steps=3), tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()
