"""Which folder compiled programs are kept in."""

import jax
import pytest

from moejax.train import compilation
from moejax.train.compilation import default_folder, use_compilation_cache


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """No folder is set, moejax's own is below tmp_path; the settings come back afterwards."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_by_default_a_folder_of_moejax(tmp_path):
    use_compilation_cache("")
    folder = jax.config.jax_compilation_cache_dir
    assert folder == str(default_folder())
    assert default_folder().is_dir() and default_folder().parent == tmp_path / "cache" / "jax"


def test_the_environment_comes_before_it_and_the_config_before_both(tmp_path):
    # JAX_COMPILATION_CACHE_DIR is the initial value of this setting.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "environment"))
    use_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "environment")
    use_compilation_cache(str(tmp_path / "config"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "config")
    use_compilation_cache("none")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_bucket_is_left_to_jax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_compilation_cache("gs://bucket/programs")
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_costs_compiling_again(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "file"))
    use_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir is None


def test_another_kind_of_machine_has_another_folder(monkeypatch):
    here = default_folder()
    assert default_folder() == here
    monkeypatch.setattr(compilation.platform, "machine", lambda: "another")
    assert default_folder() != here
