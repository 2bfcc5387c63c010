"Files of weights: every layout that exists, stitched and lazy; hostile, cut and foreign files refused with a reason and nothing run."
import hashlib
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from seer_nb import containers
from seer_nb.containers import open_tensors


def make_state():
    torch.manual_seed(0)
    return OrderedDict({
        "conv.weight": torch.randn(4, 3, 3, 3), "half.weight": torch.randn(5).half(), "brain.weight": torch.randn(2, 3).bfloat16(), "norm.num_batches_tracked": torch.tensor(7),
        "empty.weight": torch.zeros(0, 3), "flag.weight": torch.tensor([True, False]), "bytes.weight": torch.arange(5, dtype=torch.uint8), "double.weight": torch.randn(3).double()})


def same_tensor(a, b): return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.detach().contiguous().reshape(-1).view(torch.uint8))


def same(file, state, prefix=""):
    assert set(file.entries) == {prefix + name for name in state}
    for name, wanted in state.items():
        entry = file.entries[prefix + name]
        got = entry.read()
        assert entry.shape == tuple(wanted.shape) and entry.dtype == wanted.dtype and same_tensor(got, wanted), name
        assert got.is_contiguous() and got.device.type == "cpu" and not got.requires_grad and (not got.numel() or got.data_ptr() % 64 == 0)
    return True


def refused(path, *words, error=ValueError):
    with pytest.raises(error) as caught: open_tensors(path)
    assert type(caught.value) is error and str(path) in str(caught.value)
    for word in words: assert word in str(caught.value), str(caught.value)


def vissl(model, kind="consolidated", **more):
    return {**({"type": kind} if kind else {}), "iteration": 124500, "phase_idx": 0, **more, "classy_state_dict": {"base_model": {"model": model}, "phase_idx": 3, "optimizer": {"lr": 0.1}}}


# ---- the formats

@pytest.mark.parametrize("how", [{}, {"pickle_protocol": 5}, {"pickle_protocol": 3}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_torch_files_of_any_age(tmp_path, how):
    "What torch.load(weights_only=True) reads, bit for bit: types, strides, parameters, views."
    state = make_state()
    if not how: state |= {"small.weight": torch.randn(4).to(torch.float8_e4m3fn), "unsigned.weight": torch.arange(3).to(torch.uint16)}   # types without a storage class
    state["last.weight"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state["view.weight"] = torch.arange(100.0).view(10, 10)[2:5, 1:9:3]
    state["wide.weight"] = torch.arange(3.0).expand(1, 3)
    state["parameter.weight"] = nn.Parameter(torch.randn(3))
    marked = nn.Parameter(torch.randn(2))
    marked.note = "attributes are pickled too"
    state["marked.weight"] = marked
    torch.save(state, tmp_path / "w", **how)
    file = open_tensors(tmp_path / "w")
    assert same(file, state)
    if "pickle_protocol" not in how: assert same(file, torch.load(tmp_path / "w", weights_only=True))      # it knows protocol 2 only
    assert file.kind == ("PyTorch before 1.6" if "_use_new_zipfile_serialization" in how else "PyTorch") and file.meta == {}


def test_safetensors(tmp_path):
    state = {name: t.contiguous() for name, t in make_state().items()} | {"small.weight": torch.randn(4).to(torch.float8_e5m2)}
    save_file(state, tmp_path / "any name", {"format": "pt", "note": "x"})
    file = open_tensors(str(tmp_path / "any name"))
    assert same(file, state) and file.kind == "safetensors" and file.meta == {"format": "pt", "note": "x"}


@pytest.mark.parametrize("wrap", [
    lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}},
    lambda s: {"model": s, "optimizer": {"state": {"conv.weight": {"step": torch.ones(1)}}}},
    lambda s: {"epoch": torch.tensor(3), "model_state": s},
    lambda s: {"module": {"state_dict": s}, "loss": {"center": torch.zeros(4)}},
    lambda s: {"teacher": s, "loss": torch.zeros(1), "dino_loss": {"center": torch.zeros(4)}},
    lambda s: {"model": s, "again": s},
    lambda s: s | {"epoch": 3, "name": "a"},
], ids=range(7))
@pytest.mark.parametrize("zip_file", [True, False])
def test_the_weights_are_found(tmp_path, wrap, zip_file):
    state = make_state()
    torch.save(wrap(state), tmp_path / "w.pth", _use_new_zipfile_serialization=zip_file)
    assert same(open_tensors(tmp_path / "w.pth"), state)


def test_facts_beside_the_weights(tmp_path):
    torch.save({"state_dict": make_state(), "epoch": 90, "arch": "regnet", "best": 0.7, "args": ["x"]}, tmp_path / "w.pth")
    assert open_tensors(tmp_path / "w.pth").meta == {"epoch": 90, "arch": "regnet", "best": 0.7}


def test_several_sets_of_weights_are_a_question(tmp_path):
    student, teacher = make_state(), {name: t + 1 for name, t in make_state().items() if t.is_floating_point()}
    torch.save({"student": student, "teacher": {"backbone": teacher}}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "student, teacher.backbone", "key='student'")
    assert same(open_tensors(tmp_path / "w.pth", key="teacher.backbone"), teacher)
    with pytest.raises(ValueError, match="no weights under 'ema', but under student, teacher.backbone"): open_tensors(tmp_path / "w.pth", key="ema")


def save_hub(folder, state, kind="safetensors", shards=3):
    names, table = list(state), {}
    folder.mkdir(exist_ok=True)
    stem, index = ("model", "model.safetensors.index.json") if kind == "safetensors" else ("pytorch_model", "pytorch_model.bin.index.json")
    for n in range(shards):
        part, file = {name: state[name] for name in names[n::shards]}, f"{stem}-{n + 1:05d}-of-{shards:05d}.{kind}"
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return folder / index


@pytest.mark.parametrize("kind,says", [("safetensors", "safetensors in 3 shards"), ("bin", "PyTorch in 3 shards")])
def test_index_and_its_folder(tmp_path, kind, says):
    state = make_state()
    index = save_hub(tmp_path / "hub", state, kind)
    for path in (index, tmp_path / "hub"):
        file = open_tensors(path)
        assert same(file, state) and file.kind == says and file.meta["total_size"] == 1 and file.path == path


def test_folder_as_the_hub_caches_it(tmp_path):
    "Links into a folder of blobs, and a config beside them."
    state = make_state()
    save_file(state, tmp_path / "blob")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "snapshot/config.json").write_text("{}")
    torch.save({"x.y": torch.ones(1)}, tmp_path / "snapshot/pytorch_model.bin")
    assert same(open_tensors(tmp_path / "snapshot"), state)


def test_folder_with_one_and_with_several(tmp_path):
    state = make_state()
    torch.save(state, tmp_path / "a.pth")
    for left_over in ("optimizer.pt", "training_args.bin", "a_shard0.torch", "notes.txt"): (tmp_path / left_over).write_bytes(b"x")
    assert same(open_tensors(tmp_path), state)
    torch.save(state, tmp_path / "b.pth")
    refused(tmp_path, "a.pth, b.pth")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "no file of weights", error=FileNotFoundError)


# ---- VISSL

HEADS = {"0.clf.0.weight": torch.ones(2, 2), "1.prototypes0.weight": torch.zeros(3, 2)}


@pytest.mark.parametrize("kind", ["consolidated", None])
@pytest.mark.parametrize("zip_file", [True, False])
def test_vissl_consolidated(tmp_path, kind, zip_file):
    trunk = make_state()
    torch.save(vissl({"trunk": {f"_feature_blocks._fsdp_wrapped_module.res2._fpw_module.block1-part0.{k}": v for k, v in trunk.items()}, "heads": HEADS}, kind), tmp_path / "m.torch",
               _use_new_zipfile_serialization=zip_file)
    file = open_tensors(tmp_path / "m.torch")
    wanted = {f"trunk._feature_blocks.res2.block1-part0.{k}": v for k, v in trunk.items()} | {f"heads.{k}": v for k, v in HEADS.items()}
    assert same(file, wanted) and file.kind == "VISSL consolidated" and file.meta["iteration"] == 124500 and file.meta["phase_idx"] == 3


def save_slices(index, trunk, heads, home, old=False):
    folder = index.with_name(index.stem + "_layers")
    folder.mkdir()

    def put(name, tensor):
        file = hashlib.sha1(name.encode()).hexdigest() + ".torch"
        torch.save({"type": "slice", "weight": tensor}, folder / file)
        return f"{home}/{folder.name}/{file}"

    model = {part: {name: put(name, t) for name, t in tensors.items()} for part, tensors in (("trunk", trunk), ("heads", heads))}
    torch.save({"type": "slice_list", "layers": model["trunk"]} if old else vissl(model, "slice_list"), index)
    return folder


@pytest.mark.parametrize("old", [False, True])
def test_vissl_slices_anywhere(tmp_path, old):
    state = make_state()
    folder = save_slices(tmp_path / "s.torch", state, {} if old else HEADS, "/checkpoint/gone/with/the/cluster", old)
    wanted = {f"trunk.{k}": v for k, v in state.items()} | ({} if old else {f"heads.{k}": v for k, v in HEADS.items()})
    file = open_tensors(tmp_path / "s.torch")
    assert same(file, wanted) and file.kind == "VISSL slices"
    for slice_file in folder.iterdir(): slice_file.rename(tmp_path / slice_file.name)     # all in one folder
    assert same(open_tensors(tmp_path / "s.torch"), wanted)
    lost = hashlib.sha1(b"conv.weight").hexdigest() + ".torch"
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError) as caught: open_tensors(tmp_path / "s.torch")
    assert str(folder / lost) in str(caught.value) and str(tmp_path / lost) in str(caught.value)
    refused(next(tmp_path.glob("*[0-9a-f].torch")), "slice")


@pytest.mark.parametrize("stored", ["../secret.torch", "/../secret.torch", "x/../../secret.torch", "..", "", "/", "a\0b", 7, None, ["x"], "x" * 5000], ids=repr)
def test_slice_names_do_not_leave_the_folder(tmp_path, stored):
    (tmp_path / "in").mkdir()
    torch.save({"type": "slice", "weight": torch.ones(2)}, tmp_path / "secret.torch")
    torch.save(vissl({"trunk": {"w": stored}, "heads": {}}, "slice_list"), tmp_path / "in/s.torch")
    with pytest.raises((ValueError, FileNotFoundError)): open_tensors(tmp_path / "in/s.torch")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Parameter(torch.randn(1))


def shard(module, wrapped, world, flatten):
    """What each rank of fairscale's FSDP saves of a module: its local state dict and metadata.

    `wrapped` are the paths of FSDP instances, outermost first; each owns the parameters that no inner one owns.
    """
    owner = {name: max((w for w in wrapped if not w or name.startswith(w + ".")), key=len) for name, _ in module.named_parameters()}
    states, metas = [{} for _ in range(world)], [{"param_metadata": [], "buffer_names": [name for name, _ in module.named_buffers()]} for _ in range(world)]
    for path in wrapped:
        own = {name[len(path) + 1 if path else 0:]: p.detach() for name, p in module.named_parameters() if owner[name] == path}
        groups = {"flat_param_0": list(own)} if flatten and own else {name: [name] for name in own}
        for meta in metas: meta["param_metadata"].append({"fsdp_path": path, "params": {}, "no_broadcast_optim_state": False, "shared_param_info": []})
        for flat, names in groups.items():
            chunks = list(torch.cat([own[name].flatten() for name in names]).chunk(world))
            chunks += [torch.empty(0)] * (world - len(chunks))
            for rank, chunk in enumerate(chunks):
                pad = len(chunks[0]) - len(chunk)
                states[rank][f"{path}.{flat}" if path else flat] = nn.functional.pad(chunk, (0, pad))
                metas[rank]["param_metadata"][-1]["params"][flat] = {"names": names, "shapes": [own[n].shape for n in names], "numels": [own[n].numel() for n in names], "padding": pad}
    for rank, state in enumerate(states): state |= {name: b.clone() if rank == 0 else torch.zeros_like(b) for name, b in module.named_buffers()}   # shard 0's count
    return states, metas


def save_shards(index, trunk, heads, world, flatten, home="", edit=lambda shards: None):
    torch.manual_seed(1)
    trunk_states, trunk_metas = shard(trunk, ["", "res2", "res2.inner"], world, flatten)
    parts = [shard(head, [""], world, flatten) for head in heads]
    shards = [vissl({"trunk": trunk_states[r], "heads": [states[r] for states, _ in parts]}, "shard") for r in range(world)]
    for r, content in enumerate(shards): content["classy_state_dict"]["base_model"]["meta"] = {"trunk": trunk_metas[r], "heads": [metas[r] for _, metas in parts]}
    edit(shards)
    for r, content in enumerate(shards): torch.save(content, index.with_name(f"{index.stem}_shard{r}.torch"))
    torch.save({"type": "shard_list", "shards": [f"{home}{index.stem}_shard{r}.torch" for r in range(world)]}, index)


def network():
    torch.manual_seed(0)
    trunk = nn.Sequential(OrderedDict(stem=Block(4), res2=nn.Sequential(OrderedDict(first=Block(3), inner=Block(5)))))
    for b in trunk.buffers(): b.copy_(torch.randint(1, 9, b.shape))
    return trunk, [nn.Linear(7, 3), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_vissl_shards_are_stitched(tmp_path, world, flatten):
    trunk, heads = network()
    wanted = {f"trunk.{k}": v for k, v in trunk.state_dict().items()} | {f"heads.{n}.{k}": v for n, head in enumerate(heads) for k, v in head.state_dict().items()}
    save_shards(tmp_path / "m.torch", trunk, heads, world, flatten)
    file = open_tensors(tmp_path / "m.torch")
    assert same(file, wanted) and file.kind == f"VISSL, {world} FSDP shard{'s' * (world > 1)}" and file.meta["iteration"] == 124500
    assert same(open_tensors(tmp_path), wanted)       # the folder: the list, not a shard
    save_shards(tmp_path / "m.torch", trunk, heads, world, flatten, home="/checkpoint/gone/")
    assert same(open_tensors(tmp_path / "m.torch"), wanted)
    refused(tmp_path / "m_shard0.torch", "one of several shards")


def test_a_parameter_needs_only_its_own_shards(tmp_path):
    trunk, heads = network()
    save_shards(tmp_path / "m.torch", trunk, heads, 4, True)
    file = open_tensors(tmp_path / "m.torch")
    (tmp_path / "m_shard3.torch").unlink()
    assert same_tensor(file.entries["trunk.stem.scale"].read(), trunk.stem.scale)
    with pytest.raises(FileNotFoundError, match="m_shard3.torch"): file.entries["trunk.stem.norm.bias"].read()


def test_whole_and_shared_parameters_of_shards(tmp_path):
    "no_broadcast_optim_state: rank 0 has it whole. shared_param_info: two names, one parameter. Heads without metadata were not sharded."
    trunk, _ = network()
    whole = trunk.res2.inner.scale.detach().clone()

    def edit(shards):
        for content in shards:
            model, meta = content["classy_state_dict"]["base_model"]["model"], content["classy_state_dict"]["base_model"]["meta"]
            inner = meta["trunk"]["param_metadata"][2]
            inner["no_broadcast_optim_state"], inner["shared_param_info"] = True, [("scale", "twin.scale")]
            inner["params"] = {"scale": {"names": ["scale"], "shapes": [whole.shape], "numels": [1], "padding": 0}}
            model["trunk"]["res2.inner.scale"] = whole
            model["heads"], content["classy_state_dict"]["base_model"]["meta"] = [{"clf.weight": torch.ones(2)}], {"trunk": meta["trunk"]}

    save_shards(tmp_path / "m.torch", trunk, [], 2, False, edit=edit)
    file = open_tensors(tmp_path / "m.torch")
    assert same_tensor(file.entries["trunk.res2.inner.scale"].read(), whole) and same_tensor(file.entries["trunk.res2.inner.twin.scale"].read(), whole)
    assert same_tensor(file.entries["heads.0.clf.weight"].read(), torch.ones(2))


def about_of(content): return content["classy_state_dict"]["base_model"]["meta"]["trunk"]["param_metadata"][0]["params"]["flat_param_0"]


@pytest.mark.parametrize("edit", [
    lambda shards: about_of(shards[1]).update(padding=10**6),
    lambda shards: about_of(shards[1]).update(padding=-3),
    lambda shards: about_of(shards[0]).update(shapes=[(10**9, 10**9)]),
    lambda shards: about_of(shards[0])["names"].pop(),
    lambda shards: about_of(shards[0])["shapes"].pop(),
    lambda shards: about_of(shards[0]).pop("shapes"),
    lambda shards: shards[1]["classy_state_dict"]["base_model"].pop("meta"),
    lambda shards: shards[2]["classy_state_dict"]["base_model"]["model"].pop("heads"),
    lambda shards: shards[0]["classy_state_dict"]["base_model"]["model"]["trunk"].pop("flat_param_0"),
    lambda shards: shards[1]["classy_state_dict"]["base_model"]["model"]["trunk"].update(flat_param_0=torch.zeros(3)),
    lambda shards: shards[1].update(type="consolidated"),
], ids=range(11))
def test_shards_that_do_not_fit(tmp_path, edit):
    trunk, heads = network()
    save_shards(tmp_path / "m.torch", trunk, heads, 3, True, edit=edit)
    refused(tmp_path / "m.torch")


def test_missing_shard(tmp_path):
    trunk, heads = network()
    save_shards(tmp_path / "m.torch", trunk, heads, 3, True)
    for listed in ([], ["m_shard0.torch", "m_shard1.torch"], ["m_shard0.torch"] * 3, "m_shard0.torch", [7]):
        torch.save({"type": "shard_list", "shards": listed}, tmp_path / "short.torch")
        refused(tmp_path / "short.torch")
    (tmp_path / "m_shard1.torch").unlink()
    refused(tmp_path / "m.torch", "m_shard1.torch", "looked for", error=FileNotFoundError)


# ---- files that would run something

class Payload:
    "An object whose loading calls a function."

    def __init__(self, call, *args): self.call, self.args = call, args

    def __reduce__(self): return self.call, self.args


def touch(path): Path(path).touch()      # a function outside Python's library


CALLS = {"os.system": lambda marker: Payload(os.system, f"touch {marker}"), "exec": lambda marker: Payload(exec, f"open({str(marker)!r}, 'w')"),
         "Popen": lambda marker: Payload(subprocess.Popen, ["touch", str(marker)]), "library": lambda marker: Payload(touch, str(marker))}
POSITIONS = {
    "whole": lambda s, evil: evil,
    "beside": lambda s, evil: {"state_dict": s, "args": evil},
    "optimizer": lambda s, evil: {"state_dict": s, "optimizer": {"state": {0: {"momentum": [evil]}}}},
    "among": lambda s, evil: s | {"evil.weight": evil},
    "vissl": lambda s, evil: vissl({"trunk": s, "heads": {}}, "consolidated", meters=evil),
    "vissl trunk": lambda s, evil: vissl({"trunk": s | {"w": evil}, "heads": {}}),
    "type": lambda s, evil: vissl({"trunk": s, "heads": {}}, evil),
    "shards": lambda s, evil: {"type": "shard_list", "shards": [evil]},
    "slices": lambda s, evil: {"type": "slice_list", "layers": {"w": evil}},
}


def test_the_payloads_do_run_when_unpickled(tmp_path):
    for name, make in CALLS.items():
        if name != "Popen": pickle.loads(pickle.dumps(make(tmp_path / name)))
    assert {p.name for p in tmp_path.iterdir()} == {"os.system", "exec", "library"}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("zip_file", [True, False])
def test_nothing_is_run(tmp_path, position, call, zip_file):
    marker, state = tmp_path / "marker", make_state()
    torch.save(POSITIONS[position](state, CALLS[call](marker)), tmp_path / "w.bin", _use_new_zipfile_serialization=zip_file)
    (tmp_path / "model.bin.index.json").write_text(json.dumps({"weight_map": {name: "w.bin" for name in state}}))
    for path in (tmp_path / "w.bin", tmp_path / "model.bin.index.json"):
        if call == "library" and position in ("beside", "optimizer", "vissl"):        # not a weapon of Python's own: left out, and said
            assert "touch" in open_tensors(tmp_path / "w.bin").meta["left out"]
        elif call == "library": refused(tmp_path / "w.bin")
        else: refused(path, "Nothing was run", {"os.system": "system", "exec": "exec", "Popen": "Popen"}[call])
    assert not marker.exists()


@pytest.mark.parametrize("call", ["os.system", "library"])
def test_nothing_is_run_from_shards_and_slices(tmp_path, call):
    marker = tmp_path / "marker"
    trunk, heads = network()
    save_shards(tmp_path / "m.torch", trunk, heads, 2, True, edit=lambda shards: shards[1]["classy_state_dict"]["base_model"]["model"]["trunk"].update(evil=CALLS[call](marker)))
    refused(tmp_path / "m.torch", "Nothing was run")
    folder = save_slices(tmp_path / "s.torch", make_state(), {}, "/x")
    torch.save({"type": "slice", "weight": CALLS[call](marker)}, folder / f"{hashlib.sha1(b'conv.weight').hexdigest()}.torch")
    refused(tmp_path / "s.torch", "Nothing was run")
    assert not marker.exists()


def put_pickle(path, program: bytes, state=None):
    "Replace the pickle of a file of torch.save."
    buffer = io.BytesIO()
    torch.save(state or {"a.b": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist(): target.writestr(info.filename, program if info.filename.endswith("data.pkl") else source.read(info))
    return path


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(({})Q{}){}{})\x89)tR"
PROGRAMS = {   # hand-written; none is made by a pickler
    "INST": b"(S'touch MARKER'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nX\x0c\x00\x00\x00touch MARKERo.",
    "BUILD": b"\x80\x02ctest_containers\nBlock\n)\x81}X\x01\x00\x00\x00acos\nsystem\nX\x0c\x00\x00\x00touch MARKER\x85Rsb.",
    "as a key": b"\x80\x02}cos\nsystem\nX\x0c\x00\x00\x00touch MARKER\x85RK\x01s.",
    "popped": b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch MARKER\x85R0}.",
    "dotted": b"\x80\x04\x8c\x13torch.serialization\x94\x8c\x09os.system\x93\x8c\x0ctouch MARKER\x85R.",
    "extension": b"\x80\x02\x82\x01.",
    "nested tuples as a key": b"\x80\x02}K\x01K\x01\x86q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200)) + b"K\x01s.",
    "nested lists as a shape": b"\x80\x02}X\x03\x00\x00\x00a.bctorch._utils\n_rebuild_tensor_v2\n(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00]q\x00"
                               + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(200)) + b"\x85)tRs.",
    "nested lists as a storage": b"\x80\x02}X\x03\x00\x00\x00a.bctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n]q\x00"
                                 + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(200)) + b"X\x03\x00\x00\x00cpuK\x02tQK\x00)))tRs.",
    "dicts in dicts": b"\x80\x02}q\x00" + b"".join(b"}(X\x01\x00\x00\x00ah" + bytes([i]) + b"X\x01\x00\x00\x00bh" + bytes([i]) + b"uq" + bytes([i + 1]) for i in range(200)) + b".",
    "in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "16 GiB of zeros": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x04\x85R.",
    "a long string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.",
    "a huge number": b"\x80\x02\x8b\xff\xff\xff\x00" + b"\x7f" * 0xFFFFFF + b".",
    "a huge memo": b"\x80\x02}p99999999999999999999\n.",
    "no end": b"\x80\x02}" * 1000,
    "endless": b"]" * 100_001 + b".",
    "underflow": b"\x80\x02RRRR.",
    "marks": b"\x80\x02(((1111.",
    "nothing": b"",
    "garbage": bytes(range(256)) * 8,
    "not text": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "a global of ints": b"\x80\x04K\x01K\x02\x93.",
    "a call of a list": b"\x80\x02])R.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_no_pickler_writes(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(containers, "_MAX_STEPS", 100_000)
    program = PROGRAMS[name].replace(b"touch MARKER", b"touch marker")
    refused(put_pickle(tmp_path / "w.pth", program))
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    (tmp_path / "old.pth").write_bytes(magic + b"\x80\x02M\xe9\x03." + b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s." + program + b"\x80\x02].")
    refused(tmp_path / "old.pth")
    assert not (tmp_path / "marker").exists()


def test_harmless_objects_are_left_out(tmp_path):
    "What refuses to load with weights_only=True: the arguments of a run, paths, NumPy scalars, objects of a library that is not installed."
    import argparse
    import numpy
    from pathlib import PosixPath

    class Meter: pass

    Meter.__module__, Meter.__qualname__ = "vissl.meters", "Meter"
    module = type(sys)("vissl.meters")
    module.Meter = Meter
    sys.modules |= {"vissl": type(sys)("vissl"), "vissl.meters": module}
    try: torch.save({"state_dict": make_state(), "args": argparse.Namespace(lr=1), "dir": PosixPath("/x"), "best": numpy.float64(0.5), "meter": Meter()}, tmp_path / "w.pth")
    finally: del sys.modules["vissl"], sys.modules["vissl.meters"]
    file = open_tensors(tmp_path / "w.pth")
    assert same(file, make_state()) and file.meta == {"left out": "vissl.meters.Meter"}


def test_whole_models_are_not_read(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "torch.nn.modules.linear.Linear", "state_dict()")
    torch.save({"model": nn.Linear(2, 2), "epoch": 1}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "model (torch.nn.modules.linear.Linear), epoch")


def test_control_characters_are_not_printed(tmp_path):
    torch.save({"student": {"a.b": torch.ones(1)}, "ema": {"\x1b]0;evil\x07": {"a.b": torch.ones(1)}}}, tmp_path / "w.pth")
    with pytest.raises(ValueError) as caught: open_tensors(tmp_path / "w.pth")
    assert str(caught.value).isprintable()


# ---- files that claim more than they hold

@pytest.mark.parametrize("make", [lambda: torch.zeros(1).expand(10**12), lambda: torch.zeros(8, device="meta"), lambda: torch.eye(3).to_sparse(),
                                  lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), lambda: torch.nested.nested_tensor([torch.ones(2)])],
                         ids=["stretched", "meta", "sparse", "quantised", "nested"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_are_not_all_there(tmp_path, make):
    torch.save({"a.weight": torch.ones(2), "b.weight": make()}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "'b.weight'")


def program_of(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as f: return f.read("archive/data.pkl")


@pytest.mark.parametrize("old,new", [(b"K\x06tq\x07Q", b"J\xff\xff\xff\x7ftq\x07Q"), (b"K\x06tq\x07Q", b"J\xff\xff\xff\xfftq\x07Q"), (b"K\x02K\x03\x86", b"K\x02K\x7f\x86"), (b"K\x00K\x02K\x03\x86", b"K\x01K\x02K\x03\x86"),
                                     (b"K\x03K\x01\x86", b"K\x09K\x01\x86"), (b"K\x03K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"), (b"K\x02K\x03\x86", b"K\x02G@\x08\x00\x00\x00\x00\x00\x00\x86"),
                                     (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"), (b"FloatStorage", b"DoubleStorage"), (b"FloatStorage", b"EvilStorage")], ids=range(10))
def test_edited_descriptions(tmp_path, old, new):
    state = {"a.weight": torch.ones(2, 3)}
    program = program_of(state)
    assert program.count(old) == 1, pickletools.dis(program)
    refused(put_pickle(tmp_path / "w.pth", program.replace(old, new), state), "'a.weight'")


def test_many_names_for_the_same_numbers(tmp_path):
    tensor = torch.zeros(1000)
    torch.save({f"{n}.weight": tensor for n in range(1000)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "share memory")


def header(table, data=b""):
    text = json.dumps(table).encode() if not isinstance(table, bytes) else table
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    header({"a": GOOD}, b"\0" * 7), header({"a": GOOD}, b"\0" * 9), header({"a": GOOD | {"shape": [3]}}, b"\0" * 8), header({"a": GOOD, "b": GOOD}, b"\0" * 8),
    header({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, b"\0" * 12), header({"a": GOOD, "b": GOOD | {"data_offsets": [12, 20]}}, b"\0" * 20),
    header({"a": GOOD | {"shape": [0, 2**63]}}, b"\0" * 8), header({"a": GOOD | {"shape": [0] * 99, "data_offsets": [0, 0]}}), header({"a": GOOD | {"shape": [-2]}}, b"\0" * 8),
    header({"a": GOOD | {"shape": [2.0]}}, b"\0" * 8), header({"a": GOOD | {"shape": [True, 2]}}, b"\0" * 8), header({"a": GOOD | {"dtype": "__class__"}}, b"\0" * 8), header({"a": GOOD | {"dtype": ["F32"]}}, b"\0" * 8),
    header({"a": GOOD | {"data_offsets": [8, 0]}}, b"\0" * 8), header({"a": GOOD | {"data_offsets": [-8, 0]}}, b"\0" * 8), header({"a": GOOD | {"data_offsets": [0, 8, 9]}}, b"\0" * 8),
    header({"a": {}}, b"\0" * 8), header({"a": []}, b"\0" * 8), header(b"{" * 10**6), header(b'{"a":' * 10**5), header(b'{"a": ' + b"9" * 10**5 + b"}"), header(b"{\xff}"),
    struct.pack("<Q", 2**39) + b"{}", struct.pack("<Q", 50) + b"{}"], ids=range(24))
def test_safetensors_that_lie(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    refused(tmp_path / "w")


def test_safetensors_with_an_endless_header(tmp_path):
    with open(tmp_path / "w", "wb") as f:
        f.write(struct.pack("<Q", 10**11) + b"{")
        f.truncate(10**11 + 100)          # a hole, which takes no space
    refused(tmp_path / "w", "table")
    with open(tmp_path / "j", "wb") as f:
        f.write(b'{"weight_map": ')
        f.truncate(10**11)
    refused(tmp_path / "j", "table")


# ---- archives

def test_compressed_archives(tmp_path):
    torch.save(make_state(), tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as source, zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist(): target.writestr(info.filename, source.read(info))
    refused(tmp_path / "z.pth", "compressed")


def test_archive_members_that_overlap_or_repeat(tmp_path):
    torch.save({"a.weight": torch.ones(100), "b.weight": torch.ones(100)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "w.pth") as f: first, second = (f.getinfo(f"w/data/{n}").header_offset for n in (0, 1))
    at = content.rindex(struct.pack("<I", second))
    (tmp_path / "overlap.pth").write_bytes(content[:at] + struct.pack("<I", first) + content[at + 4:])
    refused(tmp_path / "overlap.pth", "overlap")
    (tmp_path / "twice.pth").write_bytes(content.replace(b"w/data/1", b"w/data/0"))
    refused(tmp_path / "twice.pth", "damaged")


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as f: f.writestr("arr_0.npy", b"x")
    refused(tmp_path / "a.npz", "arr_0.npy")
    with zipfile.ZipFile(tmp_path / "s.pt", "w") as f:
        for name in ("data.pkl", "constants.pkl", "code/x.py"): f.writestr(f"s/{name}", b"\x80\x02}.")
    refused(tmp_path / "s.pt", "TorchScript")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as f: f.writestr("b/data.pkl", b"\x80\x02}."), f.writestr("b/byteorder", b"big")
    refused(tmp_path / "b.pt", "big-endian")


# ---- damage

def small_files(folder):
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(3, dtype=torch.int64)}
    torch.save(state, folder / "new"), torch.save(state, folder / "old", _use_new_zipfile_serialization=False), save_file(state, folder / "safe")
    return [folder / name for name in ("new", "old", "safe")]


def test_cut_anywhere(tmp_path):
    for path in small_files(tmp_path):
        content = path.read_bytes()
        for end in range(0, len(content), 11 if path.name == "new" else 3):
            (tmp_path / "cut").write_bytes(content[:end])
            refused(tmp_path / "cut")


def test_any_flipped_byte(tmp_path):
    "It opens or is refused; whatever opens can be read."
    opened = 0
    for path in small_files(tmp_path):
        content = path.read_bytes()
        for at in range(0, len(content), 5):
            (tmp_path / "flipped").write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1:])
            try: file = open_tensors(tmp_path / "flipped")
            except ValueError: continue
            for entry in file.entries.values(): assert tuple(entry.read().shape) == entry.shape
            opened += 1
    assert opened > 50


@pytest.mark.parametrize("change", ["grown", "cut", "gone", "a pipe"])
def test_files_that_change_after_they_were_opened(tmp_path, change):
    path = tmp_path / "w"
    save_file({"a": torch.ones(100)}, path)
    entry = open_tensors(path).entries["a"]
    if change in ("gone", "a pipe"): path.unlink()
    if change == "a pipe": os.mkfifo(path)
    if change == "grown": path.write_bytes(path.read_bytes() + b"x")
    if change == "cut": os.truncate(path, 50)
    with pytest.raises(FileNotFoundError if change == "gone" else ValueError, match="w"): entry.read()


# ---- what is not a file of weights

@pytest.mark.parametrize("content,word", [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"), (b"\n <!DOCTYPE html><html>404</html>", "web page"), (b"<html>", "web page"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"), (b"\x1f\x8b\x08\0", "gzip"), (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "tar archive"), (b"\x89HDF\r\n", "HDF5"),
    (b"\x93NUMPY\x01\0", "NumPy"), (pickle.dumps({"a": 1}), "bare pickle"), (b"hello, world", "hello"), (b'{"a": 1}', "weight_map"), (b'{"a": ', "damaged"), (b"{" * 10**6, "damaged"), (b"x", "no file of weights")],
    ids=range(15))
def test_what_else_a_file_may_be(tmp_path, content, word):
    (tmp_path / "model.pth").write_bytes(content)
    refused(tmp_path / "model.pth", word)


def test_no_file_and_no_regular_file(tmp_path):
    refused(tmp_path / "none.pth", error=FileNotFoundError)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe")
    if os.path.exists("/dev/zero"): refused("/dev/zero", "device")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "no tensors with names")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    (tmp_path / "w.pth").chmod(0)
    refused(tmp_path / "w.pth", "Permission denied")


def test_distributed_checkpoints_are_not_opened(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(CALLS["os.system"](marker)))
    (tmp_path / "dcp/__0_0.distcp").write_bytes(b"x")
    refused(tmp_path / "dcp", "torch.distributed.checkpoint")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "a\\b", "..", ".", "", 7, None, ["x"], "pipe", "missing", "folder", "x" * 300, "model.safetensors.index.json"], ids=repr)
def test_an_index_stays_in_its_folder(tmp_path, name):
    folder = tmp_path / "hub"
    folder.mkdir(), (folder / "folder").mkdir(), (folder / "sub").mkdir(), os.mkfifo(folder / "pipe")
    for path in (tmp_path / "secret.safetensors", folder / "sub/x.safetensors"): save_file({"a": torch.ones(2)}, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, error=FileNotFoundError if name == "missing" else ValueError)


def test_an_index_that_promises_more(tmp_path):
    index = save_hub(tmp_path, make_state())
    table = json.loads(index.read_text())
    table["weight_map"]["new.weight"] = next(iter(table["weight_map"].values()))
    index.write_text(json.dumps(table))
    refused(index, "new.weight")


# ---- memory

MEASURE = """
import sys, torch
from seer_nb.containers import open_tensors
def anonymous(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
torch.ones(10).sum()
before = anonymous()
for path in sys.argv[1:]: assert open_tensors(path).entries["small.weight"].read().tolist() == [1, 1]
print(anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_opening_takes_no_memory(tmp_path):
    state = {"large.weight": torch.zeros(30_000_000), "small.weight": torch.ones(2)}          # 120 MB
    torch.save(state, tmp_path / "new"), torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False), save_file(state, tmp_path / "safe")
    del state
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(MEASURE), *(str(tmp_path / name) for name in ("new", "old", "safe"))], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 20          # MB


def test_entries_go_to_other_processes_and_ignore_the_default_device(tmp_path):
    torch.save(make_state(), tmp_path / "w.pth")
    file = pickle.loads(pickle.dumps(open_tensors(tmp_path / "w.pth")))
    with torch.device("meta"): assert same(file, torch.load(tmp_path / "w.pth", weights_only=True, map_location="cpu"))
