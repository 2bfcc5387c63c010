"Backbone files: whole or absent, any precision and memory layout, clear errors."
import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from seer_nb.regnet import AnyNetConfig, RegNetY, regnety
from seer_nb.weights import FORMAT, load_backbone, save_backbone


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_anynet_and_torchvision_rule_survive(tmp_path):
    for model in (RegNetY(AnyNetConfig((1, 1, 1, 1), (8, 16, 24, 32), (8, 8, 8, 16), stem_width=8)), regnety("regnety_toy", width_rule="torchvision")):
        save_backbone(model, tmp_path / "b.safetensors")
        again = load_backbone(tmp_path / "b.safetensors")
        assert again.config == model.config and same(again.state_dict(), model.state_dict())
        assert all(p.requires_grad for p in again.parameters()) and not again.training


def test_channels_last_bfloat16_and_compiled_models(tmp_path):
    model = regnety("regnety_toy").to(memory_format=torch.channels_last).bfloat16()
    save_backbone(torch.compile(model), tmp_path / "b.safetensors")
    assert same(load_backbone(tmp_path / "b.safetensors").state_dict(), model.state_dict())


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    old, path = regnety("regnety_toy"), tmp_path / "b.safetensors"
    save_backbone(old, path)

    def fail(*args): raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"): save_backbone(regnety("regnety_toy"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]
    assert same(load_backbone(path).state_dict(), old.state_dict())


def test_loaded_backbone_outlives_its_file(tmp_path):
    model, path = regnety("regnety_toy"), tmp_path / "b.safetensors"
    save_backbone(model, path)
    again = load_backbone(path)
    save_backbone(regnety("regnety_toy"), path)      # another file in its place
    path.unlink()
    assert same(again.state_dict(), model.state_dict())


def test_state_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "b.safetensors"
    save_backbone(regnety("regnety_toy"), path)
    state, meta = load_file(path), {FORMAT: json.dumps({"config": dataclasses.asdict(regnety("regnety_toy").config)})}
    state["extra"] = state.pop("stem.0.weight")
    state["stem.1.bias"] = torch.zeros(5)
    save_file(state, path, meta)
    with pytest.raises(ValueError, match=r"missing: stem.0.weight; unexpected: extra; wrong shape: stem.1.bias is \[5\], not \[16\]"):
        load_backbone(path)


@pytest.mark.parametrize("about", ['{"config"', "[1]", "{}", '{"config": {"dept": 6}}', '{"config": {"depth": 6}}', '{"config": {"depths": [1], "widths": [8], "group_widths": [8]}}'])
def test_description_that_cannot_be_read(tmp_path, about):
    path = tmp_path / "b.safetensors"
    save_file({"x": torch.zeros(1)}, path, {FORMAT: about})
    with pytest.raises(ValueError, match="b.safetensors describes no network"): load_backbone(path)


def test_loaded_backbone_computes_the_same_bits(tmp_path):
    model, images = regnety("regnety_toy").eval(), torch.randn(2, 3, 64, 64)
    save_backbone(model, tmp_path / "b")
    for _ in range(3):
        again = load_backbone(tmp_path / "b")
        assert all(t.data_ptr() % 64 == 0 for t in again.state_dict().values())
        with torch.inference_mode(): assert torch.equal(again(images), model(images))


def test_same_backbone_same_bytes(tmp_path):
    model = regnety("regnety_toy")
    for name in "ab": save_backbone(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
