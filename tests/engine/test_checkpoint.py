"""Names of models that can only mean a folder, and what is wrong with them."""

from __future__ import annotations

import pytest

from mii_hcache.engine.checkpoint import open_checkpoint, why_no_folder
from mii_hcache.engine.config_geometry import read_config
from mii_hcache.errors import ConfigError


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "org/name.json"])
def test_what_may_be_a_hub_id_is_left_to_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    assert why_no_folder(name) is None


@pytest.mark.parametrize(
    "name", ["./llama", "../llama", "/no/such/llama", "~/no-such-llama", "models/llama/7b", "llama/"]
)
def test_a_folder_that_is_not_there(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    reason = why_no_folder(name)
    assert reason is not None and reason.startswith("there is no folder /")


def test_a_file_that_is_not_there(tmp_path):
    assert why_no_folder(str(tmp_path / "config.json")) == f"there is no file {tmp_path / 'config.json'}"
    (tmp_path / "config.json").write_text("{}")
    assert why_no_folder(str(tmp_path / "config.json")) is None and why_no_folder(str(tmp_path)) is None


@pytest.mark.parametrize("below", ["llama-7b", "snapshots/0123abcd"])
def test_a_folder_around_a_checkpoint_names_the_checkpoint(tmp_path, below):
    assert why_no_folder(str(tmp_path)) == "there is no config.json in it"
    (tmp_path / below).mkdir(parents=True)
    (tmp_path / below / "config.json").write_text("{}")
    assert why_no_folder(str(tmp_path)) == f"there is no config.json in it; there is one in {tmp_path / below}"


@pytest.mark.parametrize("open_it", [read_config, open_checkpoint])
def test_nobody_asks_the_network_for_a_folder(monkeypatch, tmp_path, open_it):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"'\./llama'.*: there is no folder {tmp_path}/llama$"):
        open_it("./llama")
