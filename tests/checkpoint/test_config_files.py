"""The places where config.json is found: in the given folders, inside them, and beside the last one."""

from __future__ import annotations

from pathlib import Path

from dsconv.checkpoint.config_files import find_config


def written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_the_order_of_the_places(tmp_path: Path) -> None:
    tag, save = tmp_path / "run" / "tag", tmp_path / "run"
    tag.mkdir(parents=True)
    assert find_config([tag, save]) is None
    above = written(tmp_path / "config.json")
    assert find_config([tag, save]) == above
    nemo = written(save / ".hf_metadata" / "config.json")
    assert find_config([tag, save]) == nemo
    verl = written(tag / "huggingface" / "config.json")
    assert find_config([tag, save]) == verl
    own = written(tag / "config.json")
    assert find_config([tag, save]) == own
    assert find_config([]) is None


def test_one_of_several_names(tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter_config.json")
    assert find_config([tmp_path]) is None
    assert find_config([tmp_path], ("config.json", "adapter_config.json")) == adapter
