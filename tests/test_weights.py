"""Weights of five libraries: every name, shape and bit arrives, or an error says what did not.

timm, transformers and torchvision are the judges: what is written for them must load strictly there and give the same logits."""
import dataclasses
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from seer_nb.containers import Entry, open_tensors
from seer_nb.regnet import REGNETY, WIDTH_RULES, AnyNetConfig, RegNetConfig, RegNetY, regnety
from seer_nb.swav import SwAV, SwAVHead
from seer_nb.weights import (FORMAT, LAYOUTS, Preprocess, convert_state, describe, infer_config, load_backbone, load_checkpoint, load_classifier,
                             load_swav_head, main, network_name, recognise, save_backbone, save_checkpoint)

torch.set_num_threads(1)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def scrambled(module):
    "Give every tensor values that a wrong mapping cannot survive; keep activations near their size."
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
            for tensor, low, high in ((part.weight, .7, 1.3), (part.bias, -.2, .2), (part.running_mean, -.2, .2), (part.running_var, .7, 1.3)):
                with torch.no_grad(): tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
        if isinstance(part, nn.Linear): nn.init.normal_(part.weight, std=0.1, generator=generator); nn.init.normal_(part.bias, generator=generator)
    return module.eval()


# ── our own files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_entries_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "b.safetensors"
    save_backbone(regnety("regnety_toy"), path)
    state, meta = load_file(path), {FORMAT: json.dumps({"config": dataclasses.asdict(regnety("regnety_toy").config)})}
    save_file({**state, "extra": torch.zeros(1)}, path, meta)
    with pytest.raises(ValueError, match="names mean nothing.*: extra"): load_backbone(path)
    state["stem.1.bias"] = torch.zeros(5)
    del state["stem.1.weight"]
    save_file(state, path, meta)
    with pytest.raises(ValueError, match=r"missing: stem.1.weight; wrong shape: stem.1.bias is \[5\], not \[16\]"): load_backbone(path)


TOY = dataclasses.asdict(REGNETY["regnety_toy"])


@pytest.mark.parametrize("about", [
    '{"config"', "[1]", "{}", '{"config": [1]}', '{"config": {"dept": 6}}', '{"config": {"depth": 6}}', '{"config": {"depths": [1], "widths": [8], "group_widths": [8]}}',
    json.dumps({"config": {**TOY, "depth": 10**9}}), json.dumps({"config": {**TOY, "w_a": float("inf")}}), json.dumps({"config": {**TOY, "w_m": float("nan")}}),
    json.dumps({"config": TOY, "preprocess": {"size": 10**9}}), json.dumps({"config": TOY, "preprocess": {"std": ["1", "1", "1"]}}), json.dumps({"config": TOY, "preprocess": 3}),
])
def test_description_that_cannot_be_read(tmp_path, about):
    path = tmp_path / "b.safetensors"
    save_file(regnety("regnety_toy").state_dict(), path, {FORMAT: about})
    with pytest.raises(ValueError, match="b.safetensors: its metadata describe no network"): load_backbone(path)


def test_description_of_another_network(tmp_path):
    path = tmp_path / "b.safetensors"
    for config in ({**TOY, "group_width": 8}, {"depths": [1, 10**9, 1, 1], "widths": [8] * 4, "group_widths": [8] * 4}):
        save_file(regnety("regnety_toy").state_dict(), path, {FORMAT: json.dumps({"config": config})})
        with pytest.raises(ValueError, match="its metadata describe RegNetY of depths .*, its shapes regnety_toy"): load_backbone(path)


def test_files_of_the_first_version_still_load(tmp_path):
    "They had no preprocessing."
    config = regnety("regnety_toy", se_ratio=0.3).config
    save_file(RegNetY(config).state_dict(), tmp_path / "b", {FORMAT: json.dumps({"version": 1, "config": dataclasses.asdict(config)})})
    model = load_backbone(tmp_path / "b")
    assert model.config == config and model.preprocess == Preprocess()


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


def test_safetensors_reads_what_we_write(tmp_path):
    "Every type, scalars and empty tensors included."
    state = {**regnety("regnety_toy").state_dict()}
    state["stem.0.weight"] = state["stem.0.weight"].half()
    state["stem.1.bias"] = state["stem.1.bias"].bfloat16()
    state["stem.1.weight"] = state["stem.1.weight"].double()
    save_file(state, tmp_path / "in.safetensors")
    save_checkpoint(load_checkpoint(tmp_path / "in.safetensors"), tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), dict(sorted(state.items())))


def test_shards(tmp_path):
    model = scrambled(regnety("regnety_toy"))
    path = save_backbone(model, tmp_path / "x" / "backbone.safetensors", max_shard_size="300KB")
    names = sorted(p.name for p in path.parent.iterdir())
    assert path.name == "backbone.safetensors.index.json" and len(names) > 4
    shards = [p for p in path.parent.iterdir() if p.suffix == ".safetensors"]
    assert all(p.stat().st_size < 300_000 + 20_000 or len(load_file(p)) == 1 for p in shards)
    weight_map = json.loads(path.read_text())["weight_map"]
    assert weight_map.keys() == model.state_dict().keys() and {weight_map[k] for k in weight_map} == {p.name for p in shards}
    for given in (path, path.parent, tmp_path / "x" / "backbone.safetensors"):
        again = load_backbone(given)
        assert same(again.state_dict(), model.state_dict()) and again.config == model.config
    with pytest.raises(FileExistsError): save_backbone(model, tmp_path / "x" / "backbone.safetensors")
    assert save_backbone(model, tmp_path / "one", max_shard_size=10**9) == tmp_path / "one"
    with pytest.raises(FileExistsError): save_backbone(model, tmp_path / "one", max_shard_size="1MB")
    for size in ("5 bananas", "-1", "0", "GB"):
        with pytest.raises(ValueError, match="5GB"): save_backbone(model, tmp_path / "two", max_shard_size=size)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_what_is_written(tmp_path, umask):
    "Weights are shared in a group: the files have the permissions that any new file has."
    before = os.umask(umask)
    try:
        save_backbone(regnety("regnety_toy"), tmp_path / "b.safetensors")
        save_backbone(regnety("regnety_toy"), tmp_path / "s" / "b.safetensors", max_shard_size="1MB")
        save_checkpoint(load_checkpoint(tmp_path / "b.safetensors"), tmp_path / "b.torch", layout="vissl")
    finally: os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()} == {0o666 & ~umask}


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_failed_shards_leave_nothing(tmp_path, monkeypatch, fail_at):
    replace, calls = os.replace, []

    def fail(*args):
        calls.append(args)
        if len(calls) == fail_at: raise OSError("no space left")
        replace(*args)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"): save_backbone(regnety("regnety_toy"), tmp_path / "b.safetensors", max_shard_size="1MB")
    assert list(tmp_path.iterdir()) == []


# ── the judges ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

NETWORKS = {   # shapes of the family in small; the width rules part for the second as they do for the real 8GF
    "400mf": REGNETY["regnety_400mf"],
    "8gf": RegNetConfig(17, 24, 9.6, 2.19, 7),
    "8gf_tv": RegNetConfig(17, 24, 9.6, 2.19, 7, width_rule="torchvision"),
    "32gf": RegNetConfig(20, 24, 11.99, 2.53, 24),
}


def torchvision_net(config):
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams(*zip(*config.stages), [1.0] * 4, [2] * 4, config.se_ratio), num_classes=10, stem_width=config.stem_width)


def timm_net(config):
    from timm.models.regnet import RegNet, RegNetCfg

    return RegNet(RegNetCfg(depth=config.depth, w0=config.w_0, wa=config.w_a, wm=config.w_m, group_size=config.group_width, stem_width=config.stem_width,
                            se_ratio=config.se_ratio, group_min_ratio=0.9 if config.width_rule == "torchvision" else 0.0), num_classes=10)


def transformers_net(config):
    from transformers import RegNetConfig, RegNetForImageClassification

    depths, widths, group_widths = zip(*config.stages)
    return RegNetForImageClassification(RegNetConfig(embedding_size=config.stem_width, hidden_sizes=list(widths), depths=list(depths),
                                                     groups_width=group_widths[0], num_labels=10))


JUDGES = {"torchvision": torchvision_net, "timm": timm_net, "transformers": transformers_net}
judged = pytest.mark.parametrize("library", JUDGES)


def logits_of(net, images):
    with torch.inference_mode(): out = net(images)
    return getattr(out, "logits", out)


def test_the_small_networks_have_the_shapes_of_the_large():
    for small, large in (("8gf", "8gf"), ("32gf", "32gf")):
        assert [s.depth for s in NETWORKS[small].stages] == [s.depth for s in REGNETY[f"regnety_{large}"].stages]
    assert [s.width for s in NETWORKS["8gf"].stages] == [21, 56, 112, 259] and [s.width for s in NETWORKS["8gf_tv"].stages] == [28, 56, 112, 259]


@judged
@pytest.mark.parametrize("network", NETWORKS)
def test_same_logits_both_ways(library, network, tmp_path):
    pytest.importorskip(library)
    torch.manual_seed(0)
    theirs, config, images = scrambled(JUDGES[library](NETWORKS[network])), NETWORKS[network], torch.randn(2, 3, 64, 64)
    want = logits_of(theirs, images)
    assert 0.05 < want.std() < 50, "the comparison needs outputs of a sensible size"

    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")                                   # theirs, as they save it, in our hands
    checkpoint = load_checkpoint(tmp_path / "theirs.pth")
    backbone = load_backbone(checkpoint)
    assert checkpoint.layout == library and backbone.config.stages == config.stages
    ours = nn.Sequential(backbone, load_classifier(checkpoint))
    assert (logits_of(ours, images) - want).abs().max() <= 1e-4

    save_checkpoint(checkpoint, tmp_path / "ours.safetensors")                                 # ours, in their hands
    again = save_checkpoint(load_checkpoint(tmp_path / "ours.safetensors"), tmp_path / "back.safetensors", layout=library)
    state = load_file(again)
    assert same(state, {k: theirs.state_dict()[k] for k in state})
    fresh = JUDGES[library](config).eval()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(logits_of(fresh, images), want)


def test_transformers_reads_our_shards_and_we_theirs(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs, images = scrambled(transformers_net(NETWORKS["32gf"])), torch.randn(2, 3, 64, 64)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    checkpoint = load_checkpoint(tmp_path / "theirs")
    assert (logits_of(nn.Sequential(load_backbone(checkpoint), load_classifier(checkpoint)), images) - logits_of(theirs, images)).abs().max() <= 1e-4

    save_checkpoint(checkpoint, tmp_path / "ours" / "model.safetensors", layout="transformers", max_shard_size="1MB")
    theirs.config.save_pretrained(tmp_path / "ours")
    again, told = transformers.RegNetForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told[what] for what in told) and same(again.state_dict(), theirs.state_dict())

    save_checkpoint(checkpoint, tmp_path / "bare" / "model.safetensors", layout="transformers", drop="heads")
    transformers.RegNetModel(theirs.config).load_state_dict(load_file(tmp_path / "bare" / "model.safetensors"), strict=True)


def test_old_transformers_shards(tmp_path):
    "pytorch_model.bin in two files with an index, the form of the public 10B copy."
    model = scrambled(regnety("regnety_toy"))
    state = convert_state(model.state_dict(), "transformers")
    state = {f"regnet.{name}": tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    files = {"pytorch_model-00001-of-00002.bin": list(state)[:50], "pytorch_model-00002-of-00002.bin": list(state)[50:]}
    for file, names in files.items(): torch.save({name: state[name] for name in names}, tmp_path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    lines = []
    again = load_backbone(tmp_path, "regnety_toy", report=lines.append)
    assert same({k: v for k, v in again.state_dict().items()}, model.state_dict())
    assert "names of transformers" in lines[0] and "num_batches_tracked absent, set to 0" in lines[0]


def test_the_lines_on_the_page_load_what_we_write(tmp_path):
    "create_model with a file, from_pretrained with a config made from ours: same logits as before."
    timm, transformers, torchvision = map(pytest.importorskip, ("timm", "transformers", "torchvision"))
    theirs, images = scrambled(timm.create_model("regnety_004", num_classes=10)), torch.randn(2, 3, 64, 64)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    checkpoint = load_checkpoint(tmp_path / "theirs.pth")
    files = {layout: save_checkpoint(checkpoint, tmp_path / layout / "model.safetensors", layout=layout, max_shard_size="5MB" if layout == "transformers" else "5GB")
             for layout in JUDGES}
    depths, widths, groups = zip(*checkpoint.config.stages)
    config = transformers.RegNetConfig(embedding_size=32, hidden_sizes=widths, depths=depths, groups_width=groups[-1], num_labels=10)
    config.save_pretrained(tmp_path / "transformers")
    networks = [timm.create_model("regnety_004", num_classes=10, checkpoint_path=files["timm"]), torchvision.models.regnet_y_400mf(num_classes=10),
                transformers.RegNetForImageClassification.from_pretrained(tmp_path / "transformers")]
    networks[1].load_state_dict(load_file(files["torchvision"]))
    for network in networks: assert (logits_of(network.eval(), images) - logits_of(theirs, images)).abs().max() <= 1e-4


def test_networks_that_transformers_cannot_describe(tmp_path):
    "One group width for all stages, a quarter squeezed: another network is refused, and a narrow first stage is not another one."
    for config, message in ((AnyNetConfig((1, 1, 2, 1), (16, 24, 32, 64), (8, 12, 16, 8)), r"one group width .* \[8, 12, 16, 8\]"),
                            (AnyNetConfig((1, 1, 1, 1), (16,) * 4, (8,) * 4, se_ratio=0.5), "squeezes to a quarter, this network to 0.5")):
        with pytest.raises(ValueError, match=message): save_checkpoint(RegNetY(config), tmp_path / "m.safetensors", layout="transformers")
        assert list(tmp_path.iterdir()) == []
        assert infer_config(shapes(RegNetY(config))) == config
    narrow = RegNetY(AnyNetConfig((1, 1, 1, 1), (24, 48, 144, 336), (24, 48, 48, 48), 24))
    path = save_checkpoint(narrow, tmp_path / "m.safetensors", layout="transformers")
    transformers = pytest.importorskip("transformers")
    config = transformers.RegNetConfig(embedding_size=24, hidden_sizes=[24, 48, 144, 336], depths=[1] * 4, groups_width=48)
    transformers.RegNetModel(config).load_state_dict(load_file(path), strict=True)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def with_classifier(model, classes=10):
    return {**model.state_dict(), "heads.0.classifier.weight": torch.randn(classes, model.num_features), "heads.0.classifier.bias": torch.randn(classes)}


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_round_trips_are_bit_identical(source, target, tmp_path):
    "Through memory and through files, for types that differ between tensors."
    state = convert_state(with_classifier(scrambled(regnety("regnety_toy"))), source)
    state = {name: t.half() if name.endswith("0.weight") else t.bfloat16() if name.endswith("bias") else t for name, t in state.items()}
    there = convert_state(state, target)
    back = convert_state(there, source)
    assert list(back) == list(state) and all(back[name] is state[name] for name in state)
    endings = {layout: "torch" if layout == "vissl" else "safetensors" for layout in LAYOUTS}
    torch.save(state, tmp_path / "in.pth")
    first = save_checkpoint(load_checkpoint(tmp_path / "in.pth"), tmp_path / f"a.{endings[target]}", layout=target)
    second = save_checkpoint(load_checkpoint(first), tmp_path / f"b.{endings[source]}", layout=source)
    assert load_checkpoint(first).layout == target and load_checkpoint(second).layout == source
    assert same({name: entry.read() for name, entry in open_tensors(second).entries.items()}, state)


def test_converting_keeps_whatever_the_values_are():
    state = {name: object() for name in with_classifier(regnety("regnety_toy"))}
    assert set(map(id, convert_state(state, "timm").values())) == set(map(id, state.values()))


PREFIXES = {
    "seer_nb": ["", "backbone.", "module.", "model.backbone.", "backbone._orig_mod."],
    "vissl": ["", "trunk.", "trunk.base_model.", "module.trunk.", "base_model.model.trunk.", "_fsdp_wrapped_module.trunk._fpw_module."],
    "torchvision": ["", "module.", "backbone."], "timm": ["", "module.", "model."], "transformers": ["", "regnet.", "module.regnet.", "model.regnet."],
}


@pytest.mark.parametrize("layout, prefix", [(layout, prefix) for layout in PREFIXES for prefix in PREFIXES[layout]])
def test_prefixes(layout, prefix):
    state = {f"stages.{k[7:]}" if k.startswith("stages.") else k: k for k in regnety("regnety_toy").state_dict()}
    theirs = {k.removeprefix("trunk."): v for k, v in convert_state(state, layout).items()}
    assert convert_state({prefix + k: v for k, v in theirs.items()}, "seer_nb") == state


def test_vissl_parts():
    "regnet_v2 and regnet_fsdp group blocks in parts; a DDP network does not."
    state = {k: k for k in regnety("regnety_400mf").state_dict()}
    parts = {}
    for name, value in convert_state(state, "vissl").items():
        stage, dot, rest = name.partition(".block")
        part = "" if not dot else f".block{rest[0]}-part{int(rest[2]) // 2}"
        parts[f"{stage}{part}{dot}{rest}"] = value
    assert "trunk._feature_blocks.res4.block3-part1.block3-3.f.c.weight" in parts
    assert convert_state(parts, "seer_nb") == state


def swav_state(batch_norm):
    torch.manual_seed(0)
    model = SwAV(scrambled(regnety("regnety_toy")), SwAVHead(352, (48, 40), 16, n_prototypes=30, batch_norm=batch_norm))
    return scrambled_head(model).eval()


def scrambled_head(model):
    "As scrambled, for a head whose prototypes have no bias."
    for part in model.head.modules():
        if isinstance(part, nn.BatchNorm1d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var): nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def test_swav_model_of_ours_becomes_vissls():
    for model in (swav_state(True), swav_state(False)):
        theirs = convert_state(model.state_dict(), "vissl")
        assert {k.split(".")[0] for k in theirs} == {"trunk", "heads"} and "heads.0.prototypes0.weight" in theirs
        assert {k.split(".")[3] for k in theirs if "projection_head" in k} == ({"0", "1", "3", "4", "6"} if model.head.projection[1].__class__ is nn.BatchNorm1d else {"0", "2", "4"})
        ours = convert_state(theirs, "seer_nb")
        assert list(ours)[-1] == "heads.0.prototypes0.weight" and convert_state(ours, "vissl") == theirs


def test_what_has_no_place_is_named():
    state = swav_state(True).state_dict()
    for library in JUDGES:
        with pytest.raises(ValueError, match=f"{library} has no place for heads.0.projection.0.weight.* and .* more; drop='heads.0'"): convert_state(state, library)
        assert len(convert_state(state, library, drop="heads")) == len(regnety("regnety_toy").state_dict())
    both = {**convert_state(state, "seer_nb"), "heads.1.classifier.weight": 1, "heads.1.classifier.bias": 2}
    assert {1, 2} <= {v for v in convert_state(both, "timm", drop="heads.0").values() if isinstance(v, int)}
    for drop in ("head", "heads.2", "heads.0.projection", "stages"):
        with pytest.raises(ValueError, match=f"drop='{drop}' is no head; there are heads, heads.0, heads.1"): convert_state(both, "timm", drop=drop)
    with pytest.raises(ValueError, match="did you mean 'timm'"): convert_state(state, "tinm")
    two = {**with_classifier(regnety("regnety_toy")), "heads.1.classifier.weight": 1, "heads.1.classifier.bias": 2}
    with pytest.raises(ValueError, match="timm has one head.fc.weight, and heads.0.classifier.weight and heads.1.classifier.weight would be it"): convert_state(two, "timm")


def test_names_that_mean_nothing():
    state = convert_state({k: k for k in regnety("regnety_toy").state_dict()}, "timm")
    wrong = {k.replace("s3.b2.conv2.bn.running_var", "s3.b2.conv2.bn.running_variance"): v for k, v in state.items()}
    with pytest.raises(ValueError, match=r"1 of 156.*running_variance \(did you mean 's3.b2.conv2.bn.running_var'\?\)".replace("156", str(len(state)))): recognise(wrong)
    for odd in ("s01.b1.conv1.conv.weight", "s1.b0.conv1.conv.weight", "s0.b1.conv1.conv.weight", "s1.b1.conv4.conv.weight", "s1.b99999.conv1.conv.weight", "optimizer.step"):
        with pytest.raises(ValueError, match="mean nothing"): recognise([*state, odd])
    with pytest.raises(ValueError, match="several networks.*'student.'.*'teacher.'"): recognise([p + k for p in ("student.", "teacher.") for k in state])
    with pytest.raises(ValueError, match="are both stages.res2.0.a.0.weight"): recognise([*state, "s1.b1._orig_mod.conv1.conv.weight"])
    for nothing in ({}, {"epoch": 1}, {"": 1}, {"." * 10_000: 1}):
        with pytest.raises(ValueError, match="not the names of a RegNetY"): convert_state(nothing, "timm")


@judged
def test_regnetx_is_told_apart(library):
    pytest.importorskip(library)
    with torch.device("meta"):
        if library == "torchvision":
            from torchvision.models.regnet import BlockParams, RegNet
            net = RegNet(BlockParams([1, 2, 7, 12], [32, 64, 160, 384], [16] * 4, [1.0] * 4, [2] * 4))
        elif library == "timm":
            import timm
            net = timm.create_model("regnetx_004")
        else:
            from transformers import RegNetConfig, RegNetModel
            net = RegNetModel(RegNetConfig(embedding_size=32, hidden_sizes=[32, 64, 160, 384], depths=[1, 2, 7, 12], groups_width=16, layer_type="x"))
    with pytest.raises(ValueError, match="RegNetX"): infer_config({k: tuple(v.shape) for k, v in convert_state(net.state_dict(), "seer_nb").items()})


@pytest.mark.parametrize("make, what", [("resnet18", "ResNet"), ("vit_b_16", "vision transformer|no layout fits"), ("convnext_tiny", "VGG|ConvNeXt|no layout fits")])
def test_other_networks(make, what):
    import torchvision

    with torch.device("meta"): names = getattr(torchvision.models, make)().state_dict()
    with pytest.raises(ValueError, match=f"not the names of a RegNetY.*({what})"): recognise(names)


# ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def shapes(model): return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("rule", WIDTH_RULES)
@pytest.mark.parametrize("name", REGNETY)
def test_published_networks_are_named(name, rule):
    with torch.device("meta"): model = regnety(name, width_rule=rule)
    found = infer_config(shapes(model))
    assert found.stages == model.config.stages and network_name(found).split()[0] == name
    if rule == "vissl": assert found == model.config
    assert ("torchvision" in network_name(found)) == (found.width_rule == "torchvision") == (rule == "torchvision" and name in ("regnety_800mf", "regnety_8gf"))


def test_any_network_is_found():
    random = torch.Generator().manual_seed(0)
    def draw(low, high): return int(torch.randint(low, high, (), generator=random))
    for _ in range(8):
        groups = [draw(1, 9) for _ in range(4)]
        config = AnyNetConfig([draw(1, 5) for _ in range(4)], [g * draw(1, 9) for g in groups], groups, draw(1, 40), draw(1, 20) / 20)
        with torch.device("meta"): want, got = RegNetY(config), RegNetY(infer_config(shapes(RegNetY(config))))
        assert got.config.stages == config.stages and shapes(got) == shapes(want)


TOY_SHAPES = shapes(regnety("regnety_toy"))


@pytest.mark.parametrize("change, message", [
    ({"stages.res2.0.a.0.weight": (10**12, 16, 1, 1)}, "no shape of a convolution"), ({"stem.0.weight": (16, 3, 3, 3, 3)}, "no shape of a convolution"),
    ({"stem.0.weight": ()}, "no shape"), ({"stages.res3.0.b.0.weight": (48, 0, 3, 3)}, "no shape"), ({"stages.res3.0.b.0.weight": (48, -4, 3, 3)}, "no shape"),
    ({"stages.res3.0.b.0.weight": (48, 7, 3, 3)}, "group width 7 does not divide"), ({"stages.res3.0.b.0.weight": (48, 96, 3, 3)}, "does not divide"),
    ({"stages.res5.900.a.0.weight": (352, 352, 1, 1)}, r"stage res5 has the blocks \[0, 900\]"), ({"stages.res4.1.se.reduce.weight": (7, 128, 1, 1)}, "no one squeeze ratio"),
    ({"stages.res5.1.se.reduce.weight": (10**9, 1, 1, 1)}, "no shape"), ({"stages.res6.0.a.0.weight": (8, 8, 1, 1)}, "besides res2 to res5: res6"),
])
def test_hostile_shapes(change, message):
    with pytest.raises(ValueError, match=message): infer_config({**TOY_SHAPES, **change})


@pytest.mark.parametrize("name", ["stem.0.weight", "stages.res3.0.a.0.weight", "stages.res3.0.b.0.weight", "stages.res4.2.se.reduce.weight"])
def test_missing_shapes(name):
    with pytest.raises(ValueError, match=f"{name} is missing"): infer_config({k: v for k, v in TOY_SHAPES.items() if k != name})
    with pytest.raises(ValueError, match="stage res4 has the blocks"): infer_config({k: v for k, v in TOY_SHAPES.items() if "res4" not in k})


# ── VISSL ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def vissl_file(path, trunk, heads, **more):
    "A checkpoint in VISSL's own nesting."
    inner = {"base_model": {"model": {"trunk": trunk, "heads": heads}, "meta": {}}, "optimizer": {"state": {}}, "train": True}
    torch.save({"phase_idx": 0, "iteration": 244000, "loss": {}, "iteration_num": 0, "train_phase_idx": 0, "classy_state_dict": inner, **more}, path)
    return path


def trunk_of(model, part="", counters=False):
    "A RegNet trunk as VISSL names it, written out by hand: convert_state is not asked."
    inside = {"a.0": "f.a.0", "a.1": "f.a.1", "b.0": "f.b.0", "b.1": "f.b.1", "se.reduce": "f.se.excitation.0", "se.expand": "f.se.excitation.2",
              "c.0": "f.c", "c.1": "f.final_bn", "shortcut.0": "proj", "shortcut.1": "bn"}
    trunk = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked") and not counters: continue
        if name.startswith("stem."): trunk[f"_feature_blocks.conv1.{name}"] = tensor; continue
        _, res, block, *middle, leaf = name.split(".")
        stage = int(res[3]) - 1
        trunk[f"_feature_blocks.{res}.{part.format(s=stage)}block{stage}-{block}.{inside['.'.join(middle)]}.{leaf}"] = tensor
    return trunk


def vissl_swav(model):
    "The head of a SwAV model as VISSL names it."
    state = {f"0.projection_head.{k[11:]}" if k.startswith("projection") else "0.prototypes0.weight": v for k, v in model.head.state_dict().items()}
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("part", ["", "block{s}-part0."])
@pytest.mark.parametrize("prefix", ["", "base_model."])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_vissl_swav_checkpoint(tmp_path, part, prefix, batch_norm):
    "The scores of the prototypes are those of the model that was saved."
    model, lines = swav_state(batch_norm), []
    trunk = {prefix + k: v for k, v in trunk_of(model.backbone, part).items()}
    path = vissl_file(tmp_path / "x.torch", trunk, vissl_swav(model), type="consolidated")
    backbone = load_backbone(path, "regnety_toy", report=lines.append)
    arguments, state = load_swav_head(path)
    head = SwAVHead(**arguments)
    head.load_state_dict(state)
    again, images = SwAV(backbone, head).eval(), torch.randn(4, 3, 64, 64)
    with torch.inference_mode(): want, got = model([images]), again([images])
    assert all(torch.equal(a, b) for a, b in zip(want[0] + want[1], got[0] + got[1]))
    assert lines == ["regnety_toy (0.5 M parameters, float32) from x.torch: VISSL consolidated, names of vissl; SwAV head 352-48-40-16"
                     f"{' with BatchNorm' * batch_norm} and 30 prototypes; num_batches_tracked absent, set to 0; images bilinear to 256, crop 224, RGB (assumed)"]
    assert not any(state[k].is_meta for k in state) and (not batch_norm or state["projection.1.num_batches_tracked"] == 0)


def test_vissl_slices(tmp_path):
    "One file per tensor, named in the index by paths of another machine."
    import hashlib

    model = swav_state(False)
    (tmp_path / "x_layers").mkdir()

    def sliced(state, part):
        where = {}
        for name, tensor in state.items():
            file = f"x_layers/{hashlib.sha1(f'{part}.{name}'.encode()).hexdigest()}.torch"
            torch.save({"type": "slice", "weight": tensor}, tmp_path / file)
            where[name] = f"/checkpoint/someone/{file}"
        return where

    path = vissl_file(tmp_path / "x.torch", sliced(trunk_of(model.backbone, "block{s}-part0."), "trunk"), sliced(vissl_swav(model), "heads"), type="slice_list")
    lines = []
    again = load_backbone(path, report=lines.append)
    assert same(again.state_dict(), model.backbone.state_dict()) and "VISSL slices" in lines[0] and "SwAV head 352-48-40-16 and 30 prototypes" in lines[0]


def test_what_we_write_for_vissl_is_what_vissl_reads(tmp_path):
    "Its loader asks for this nesting, takes names without trunk. and heads., and unpickles plain dictionaries."
    model = swav_state(True)
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    path = save_checkpoint(load_checkpoint(tmp_path / "ours.pth"), tmp_path / "x.torch", layout="vissl")
    whole = torch.load(path, weights_only=True)
    inner = whole["classy_state_dict"]["base_model"]["model"]
    assert whole["type"] == "consolidated" and type(inner["trunk"]) is dict and inner.keys() == {"trunk", "heads"}
    assert same(inner["trunk"], trunk_of(model.backbone, counters=True))
    assert {k: v for k, v in inner["heads"].items() if "num_batches" not in k}.keys() == vissl_swav(model).keys()
    with pytest.raises(ValueError, match="vissl reads .torch"): save_checkpoint(load_checkpoint(path), tmp_path / "x.safetensors", layout="vissl")
    with pytest.raises(ValueError, match="timm reads .safetensors"): save_checkpoint(load_checkpoint(path), tmp_path / "x.pth", layout="timm", drop="heads")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pth", "x.torch"]


def test_timm_reads_what_we_write_for_vissl(tmp_path):
    "timm maps VISSL's SEER files to its own names; on our file it arrives at what convert_state says, and loads it strictly."
    pytest.importorskip("timm")
    from timm.models.regnet import _filter_fn

    theirs, images = scrambled(timm_net(NETWORKS["32gf"])), torch.randn(2, 3, 64, 64)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    path = save_checkpoint(load_checkpoint(tmp_path / "theirs.pth"), tmp_path / "x.torch", layout="vissl")
    state = _filter_fn(torch.load(path, weights_only=True))
    assert same(state, theirs.state_dict())
    fresh = timm_net(NETWORKS["32gf"]).eval()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(logits_of(fresh, images), logits_of(theirs, images))


def test_vissl_classifiers(tmp_path):
    "mlp, and eval_mlp with its batch normalisation, for several layers of the trunk."
    backbone, linear = scrambled(regnety("regnety_toy")), scrambled(nn.Linear(352, 10))
    path = vissl_file(tmp_path / "mlp.torch", trunk_of(backbone), {f"0.clf.0.{k}": v for k, v in linear.state_dict().items()})
    features = torch.randn(3, 352)
    assert torch.equal(load_classifier(path)(features), linear(features))
    probes = [scrambled(nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 10))) for width in (128, 352)]
    heads = {f"{k}.{'channel_bn' if layer == 0 else 'clf.clf.0'}.{name}": v for k, probe in enumerate(probes) for layer in (0, 1) for name, v in probe[layer].state_dict().items()}
    path = vissl_file(tmp_path / "eval.torch", trunk_of(backbone), heads)
    with pytest.raises(ValueError, match=r"choose a classifier with head= \(0: classifier 128-10 behind a BatchNorm; 1: classifier 352-10"): load_classifier(path)
    classifier = load_classifier(path, head=1)
    assert torch.equal(classifier(features), probes[1](features)) and not classifier.training
    again = save_checkpoint(load_checkpoint(path), tmp_path / "again.torch", layout="vissl")
    assert same({k: e.read() for k, e in open_tensors(again).entries.items()}, {k: e.read() for k, e in open_tensors(path).entries.items()})
    with pytest.raises(ValueError, match="timm has no place for heads.0.bn.weight"): convert_state(open_tensors(path).entries, "timm")
    with pytest.raises(ValueError, match="there is no SwAV head"): load_swav_head(path)


def test_other_heads_do_not_keep_the_backbone_away(tmp_path):
    model, lines = scrambled(regnety("regnety_toy")), []
    path = vissl_file(tmp_path / "simclr.torch", trunk_of(model), {"0.clf.0.weight": torch.zeros(8, 352), "0.clf.0.bias": torch.zeros(8), "0.clf.2.weight": torch.zeros(4, 8)})
    load_backbone(path, report=lines.append)
    assert "head of another kind (3 tensors)" in lines[0]
    with pytest.raises(ValueError, match="simclr.torch: a classifier has another structure; unexpected: clf.2.weight"): load_classifier(path)
    with pytest.raises(ValueError, match="dtype must be a floating type"): load_classifier(path, dtype=torch.int8)
    again = save_checkpoint(load_checkpoint(save_checkpoint(load_checkpoint(path), tmp_path / "o.safetensors")), tmp_path / "again.torch", layout="vissl")
    assert open_tensors(again).entries.keys() == open_tensors(path).entries.keys()


@pytest.mark.parametrize("change, message", [
    ({"projection.2.weight": (40, 47)}, "do not fit together"), ({"prototypes0.weight": (30, 9)}, "wrong shape: prototypes0.weight"),
    ({"projection.1.weight": (3, 3, 3)}, "another structure"), ({"prototypes1.weight": (20, 16)}, "one set of prototypes, this head has 2"),
])
def test_swav_heads_of_another_structure(change, message, tmp_path):
    model = swav_state(False)
    heads = {**vissl_swav(model), **{f"0.{k.replace('projection', 'projection_head')}": torch.zeros(shape) for k, shape in change.items()}}
    path = vissl_file(tmp_path / "x.torch", trunk_of(model.backbone), heads)
    with pytest.raises(ValueError, match=message): load_swav_head(path)


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_name_is_checked(tmp_path):
    path = save_backbone(regnety("regnety_toy"), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors is not regnety_400mf but regnety_toy"): load_backbone(path, "regnety_400mf")
    with pytest.raises(ValueError, match="did you mean 'regnety_toy'"): load_backbone(path, "regnet_toy")
    with pytest.raises(ValueError, match="floating type"): load_backbone(path, dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match="did you mean 'seer_regnety_32gf'"): load_backbone("seer_regnet_32gf")


def test_missing_and_misshaped_are_spelled_as_in_the_file(tmp_path):
    state = {f"module.{k}": v for k, v in convert_state(regnety("regnety_toy").state_dict(), "torchvision").items()}
    lost = "module.trunk_output.block3.block3-1.f.se.fc2.bias"
    torch.save({k: v for k, v in state.items() if k != lost}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: its tensors do not fit regnety_toy; missing: {lost}"): load_backbone(tmp_path / "a.pth")
    torch.save({**state, lost: torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=rf"wrong shape: {lost} is \[3\], not \[128\]"): load_backbone(tmp_path / "b.pth")
    torch.save({**state, lost: torch.zeros(128, dtype=torch.uint8)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="quantised"): load_backbone(tmp_path / "c.pth")


def test_a_missing_convolution_is_spelled_as_in_the_file(tmp_path):
    "The architecture is read off it, so it is missed before anything is compared."
    state = {f"module.{k}": v for k, v in convert_state(regnety("regnety_toy").state_dict(), "timm").items()}
    lost = "module.s2.b1.conv2.conv.weight"
    torch.save({k: v for k, v in state.items() if k != lost}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: {lost} is missing$"): load_backbone(tmp_path / "a.pth")
    torch.save({**state, lost: torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=rf"{lost} is \[3\], no shape of a convolution"): load_backbone(tmp_path / "b.pth")


def test_counters_that_were_cast_with_the_rest(tmp_path):
    "`{k: v.half() for k, v in state.items()}` makes floating numbers of them; they come back whole, and no other type is let through."
    model = regnety("regnety_toy")
    model.stem[1].num_batches_tracked.fill_(7)
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "half.pth")
    again = load_backbone(tmp_path / "half.pth")
    assert again.stem[1].num_batches_tracked.dtype == torch.int64 and again.stem[1].num_batches_tracked == 7 and again.stem[0].weight.dtype == torch.float16
    for layout in JUDGES:
        written = load_file(save_checkpoint(load_checkpoint(tmp_path / "half.pth"), tmp_path / f"{layout}.safetensors", layout=layout, dtype=torch.float32))
        assert {v.dtype for k, v in written.items() if k.endswith("num_batches_tracked")} == {torch.int64}


def test_one_of_several_sets_of_weights(tmp_path, capsys):
    "Training scripts keep the network and its average; which one is wanted is the caller's choice."
    model, average = scrambled(regnety("regnety_toy")), regnety("regnety_toy")
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "c.pth.tar")
    with pytest.raises(ValueError, match="state_dict, state_dict_ema.*open_tensors.*--key"): load_backbone(tmp_path / "c.pth.tar")
    for given in (open_tensors(tmp_path / "c.pth.tar", key="state_dict_ema"), load_checkpoint(tmp_path / "c.pth.tar", "state_dict_ema")):
        assert same(load_backbone(given).state_dict(), average.state_dict())
    assert main(["show", str(tmp_path / "c.pth.tar")]) == 2 and main(["show", str(tmp_path / "c.pth.tar"), "--key", "state_dict"]) == 0
    assert main(["convert", str(tmp_path / "c.pth.tar"), str(tmp_path / "o.safetensors"), "--to", "seer_nb", "--key", "state_dict"]) == 0
    assert same(load_backbone(tmp_path / "o.safetensors").state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="no weights under 'ema'"): load_checkpoint(tmp_path / "c.pth.tar", "ema")


def test_the_licence_is_told_when_a_public_file_is_fetched(tmp_path, monkeypatch, capsys):
    "By load_backbone too, once, and not among the output of a command."
    from seer_nb import zoo

    monkeypatch.setenv("SEER_NB_CACHE", str(tmp_path))

    def fetch(url, path, sha256, report):
        save_backbone(regnety("regnety_toy"), path)
        report("weights.torch: 2 MB")
        return path

    monkeypatch.setattr(zoo, "_fetch", fetch)
    for told in (True, False):
        load_backbone("seer_regnety_32gf", report=None)
        out, err = capsys.readouterr()
        assert out == "" and ("non-commercial" in err and "2 MB" in err) == told == bool(err)


def test_what_is_not_a_path(tmp_path):
    for given, name in ((None, "NoneType"), (regnety("regnety_toy").state_dict(), "OrderedDict")):
        with pytest.raises(TypeError, match=f"got {name}; for a state dict in memory see convert_state"): load_backbone(given)
    for given, name in ((tmp_path / "x.torch", "PosixPath|WindowsPath"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(TypeError, match=f"save_checkpoint takes what load_checkpoint returned, or a RegNetY; got ({name})"): save_checkpoint(given, tmp_path / "y.safetensors")


def test_one_tensor_of_the_file_at_a_time(tmp_path):
    "Cast on the way: beside the growing network, at most one tensor in the file's precision is alive."
    path = save_backbone(regnety("regnety_toy"), tmp_path / "b.safetensors")
    alive, most = weakref.WeakSet(), []

    def watched(entry):
        def read():
            tensor = entry.read()
            alive.add(tensor)
            most.append(len(alive))
            return tensor
        return Entry(entry.shape, entry.dtype, read)

    checkpoint = load_checkpoint(path)
    floating = {k: watched(e) if e.dtype.is_floating_point else e for k, e in checkpoint.backbone_state.items()}
    model = load_backbone(dataclasses.replace(checkpoint, backbone_state=floating), dtype=torch.bfloat16, report=None)
    assert len(most) > 100 and max(most) <= 2 and model.stem[0].weight.dtype == torch.bfloat16


def test_report_can_be_silenced(tmp_path, capsys):
    path = save_backbone(regnety("regnety_toy"), tmp_path / "b.safetensors")
    load_backbone(path, report=None)
    assert capsys.readouterr().out == ""
    load_backbone(path)
    assert capsys.readouterr().out == describe(load_checkpoint(path)) + "\n"


# ── preprocessing ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def photo():
    from PIL import Image
    import numpy as np

    y, x = np.mgrid[:90, :120]
    return Image.fromarray(np.stack([128 + 100 * np.sin(x / 9), 2 * x, 2 * y], 2).clip(0, 255).astype(np.uint8))


def pixels(image):
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocess_is_torchvisions_and_timms(interpolation):
    "On the PIL image as they do it: equal but for the rounding of single pixels."
    from torchvision import transforms

    preprocess = Preprocess(73, 64, interpolation)
    got = preprocess(pixels(photo()))
    resize = transforms.Resize(73, transforms.InterpolationMode(interpolation))
    theirs = [transforms.Compose([resize, transforms.CenterCrop(64), transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)])]
    try:
        from timm.data import create_transform
        theirs.append(create_transform((3, 64, 64), interpolation=interpolation, crop_pct=64 / 73, mean=preprocess.mean, std=preprocess.std))
    except ImportError: pass
    for transform in theirs:
        want = transform(photo())
        assert got.shape == want.shape and (got - want).abs().max() < 1.5 / 255 / 0.22 and (got - want).abs().mean() < 0.2 / 255 / 0.22


def test_preprocess_order_warp_and_batches():
    from torchvision import transforms

    image = pixels(photo())
    plain, bgr = Preprocess(64, 64), Preprocess(64, 64, channel_order="BGR")
    assert torch.equal(bgr(image), plain(image)[[2, 1, 0]]) and torch.equal(bgr(torch.stack([image, image]))[1], bgr(image))
    warped = Preprocess(64, 64, warp=True)(image)
    want = transforms.Normalize(plain.mean, plain.std)(transforms.ToTensor()(photo().resize((64, 64), 2)))
    assert (warped - want).abs().max() < 1.5 / 255 / 0.22
    assert torch.equal(plain.normalize(image), transforms.Normalize(plain.mean, plain.std)(image / 255))


def test_preprocess_takes_tensors_of_three_channels():
    import numpy as np

    preprocess = Preprocess(64, 64)
    for image in (photo(), np.array(photo())):
        with pytest.raises(TypeError, match="decode_image"): preprocess(image)
    for shape in ((1, 80, 80), (4, 80, 80), (80, 90, 3), (80, 80)):
        with pytest.raises(ValueError, match=r"\[\.\.\., 3, H, W\], got"): preprocess(torch.zeros(shape, dtype=torch.uint8))


def test_preprocess_travels(tmp_path):
    model = regnety("regnety_toy")
    model.preprocess = Preprocess(384, 384, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "BGR")
    for path in (save_backbone(model, tmp_path / "a.safetensors"), save_backbone(model, tmp_path / "b" / "m.safetensors", max_shard_size="1MB"),
                 save_checkpoint(model, tmp_path / "c.safetensors", layout="transformers"), save_checkpoint(load_checkpoint(tmp_path / "a.safetensors"), tmp_path / "d.safetensors")):
        assert load_backbone(path).preprocess == model.preprocess
    assert load_backbone(save_checkpoint(model, tmp_path / "e.torch", layout="vissl")).preprocess == Preprocess()


def test_public_files_bring_their_preprocessing(monkeypatch, tmp_path):
    "By the name of the file and the network in it; a stranger with the same name gets the default."
    from seer_nb.zoo import ZOO

    def opened(name, model):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        from seer_nb.containers import TensorFile
        return load_checkpoint(TensorFile(path, "VISSL consolidated", {f"trunk.{k}": Entry(tuple(v.shape), v.dtype, None) for k, v in trunk_of(model).items()}, {})).preprocess

    with torch.device("meta"): large, small = regnety("regnety_64gf"), regnety("regnety_toy")
    finetuned, supervised = (Path(ZOO[slug].url).name for slug in ("seer_regnety_64gf_in1k", "sup_regnety_64gf"))
    assert opened(finetuned, large).crop == 384 and opened(supervised, large).channel_order == "BGR"
    assert opened(finetuned, small) == opened("x.torch", large) == opened("model.safetensors", large) == Preprocess()
    assert opened("seer_regnety_64gf_in1k@timm/model.safetensors", large).crop == opened("seer_regnety_64gf_in1k@timm", large).crop == 384


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_command_line(tmp_path, capsys):
    model = swav_state(True)
    path = vissl_file(tmp_path / "x.torch", trunk_of(model.backbone), vissl_swav(model))
    assert main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "regnety_toy" in out and "res4" in out and "heads.0" in out
    assert main(["convert", str(path), str(tmp_path / "y" / "model.safetensors"), "--to", "transformers", "--dtype", "bf16", "--max-shard-size", "500KB", "--no-heads"]) == 0
    again = load_backbone(tmp_path / "y")
    assert again.stem[0].weight.dtype == torch.bfloat16 and torch.equal(again.stem[0].weight, model.backbone.stem[0].weight.bfloat16())
    capsys.readouterr()
    for words in (["show", str(tmp_path / "nothing")], ["convert", str(path), str(tmp_path / "z.safetensors"), "--to", "timm"],
                  ["convert", str(path), str(tmp_path / "z.pth"), "--to", "seer_nb"], ["convert", str(path), str(tmp_path / "z.safetensors"), "--to", "seer_nb", "--max-shard-size", "x"]):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.torch", "y"]


def test_command_line_as_a_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "seer_nb.weights", "show", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no file of weights") and done.stderr.count("\n") == 1


def test_preprocessing_beside_the_file(tmp_path, capsys):
    "timm and transformers keep it in a JSON file of their own; without any, the report says that it is assumed."
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    model = regnety("regnety_toy")
    save_file(convert_state(model.state_dict(), "timm"), tmp_path / "model.safetensors")
    assert load_backbone(tmp_path).preprocess == Preprocess()
    assert "images bilinear to 256, crop 224, RGB (assumed)" in capsys.readouterr().out
    cfg = timm.models.get_pretrained_cfg("regnety_320.seer_ft_in1k").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "regnety_320", "pretrained_cfg": cfg}, default=str))
    wanted = timm.data.resolve_data_config(pretrained_cfg=cfg)
    got = load_backbone(tmp_path / "model.safetensors").preprocess
    assert (got.crop, got.interpolation, got.mean, got.std) == (wanted["input_size"][-1], wanted["interpolation"], wanted["mean"], wanted["std"])
    assert got.size == got.crop / wanted["crop_pct"] and "assumed" not in capsys.readouterr().out
    for size, expected in ((384, (384, True)), (224, (256, False))):
        transformers.ConvNextImageProcessor(size={"shortest_edge": size}, crop_pct=224 / 256).save_pretrained(tmp_path)
        got = load_backbone(tmp_path).preprocess
        assert (got.size, got.warp, got.crop) == (*expected, size)
    for text in ("[]", "{", '{"size": 3}', '{"size": {"shortest_edge": -5}, "resample": 3, "image_mean": [1], "image_std": 0}', "[" * 100_000):
        (tmp_path / "preprocessor_config.json").write_text(text)
        assert load_backbone(tmp_path).preprocess.crop == 384                   # what timm's file says
