"Tiny copies of the data sets in their real formats, read through; and what a hostile or damaged download gets."
import builtins
import csv
import gzip
import hashlib
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from seer_nb.evaluate import annotations as ann
from seer_nb.images import BadImage

READERS = [getattr(ann, name) for name in ann.__all__ if name.startswith("read_") and name.removeprefix("read_") in (
    "clevr_count clevr_dist kitti_dist small_norb_azimuth small_norb_elevation dsprites_loc dsprites_orient patch_camelyon euro_sat resisc45 "
    "ucf101 kinetics700 wilds_iwildcam hateful_memes openimages").split()]


def picture(path, colour, size=(12, 10), **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def named(listing):
    "Image name -> class name."
    return {name: listing.classes[label] for name, label in zip(listing.names, listing.labels)}


class Images(Dataset):
    def __init__(self, listing): self.read, self.n = listing.read, len(listing.labels)
    def __len__(self): return self.n
    def __getitem__(self, i): return self.read(i)


def check_workers(listing):
    "The reader gives the same images here, through a pickle, and in forked workers after it was used here."
    here = torch.stack([listing.read(i) for i in range(len(listing.labels))])
    assert here.dtype == torch.uint8 and here.shape[1] == 3
    copy = pickle.loads(pickle.dumps(listing.read))
    assert all(torch.equal(copy(i), image) for i, image in enumerate(here))
    loader = DataLoader(Images(listing), batch_size=2, num_workers=2, multiprocessing_context="fork")
    for _ in range(2): assert torch.equal(torch.cat(list(loader)), here)


def test_there_are_fifteen_readers(): assert len(READERS) == 15


@pytest.mark.parametrize("reader", READERS)
def test_nothing_there(reader, tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=str(root)): reader(root, "train")


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader.__name__ not in ("read_resisc45", "read_kitti_dist", "read_dsprites_loc", "read_dsprites_orient")])
def test_no_such_split(reader, tmp_path):
    with pytest.raises(ValueError, match="the splits are 'train', 'test'.*, not 'tset'"): reader(tmp_path, "tset")


# ── splits and class order ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_the_seeded_split_never_changes():
    "Scores measured with one version must be comparable with those of the next."
    for n, digest in {10: "39f2c831", 7481: "9d031624", 737280: "dba2fbc9"}.items():
        train, test = ann.four_fifths(n, "train"), ann.four_fifths(n, "test")
        assert len(train) == round(0.8 * n) and np.array_equal(np.sort(np.concatenate([train, test])), np.arange(n))
        assert (np.diff(test) > 0).all() and hashlib.sha256(test.astype("<i8").tobytes()).hexdigest()[:8] == digest, n
    with pytest.raises(ValueError, match="no image"): ann.four_fifths(0, "train")
    with pytest.raises(ValueError, match="not 'val'"): ann.four_fifths(5, "val")


def test_classes_are_numbered_as_text():
    classes, labels = ann.in_order(["b", "c", "a"], [0, 1, 2, 0])
    assert classes == ("a", "b", "c") and labels.tolist() == [1, 2, 0, 1] and labels.dtype == np.int64


# ── CLEVR ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def clevr(root, depths, part="val", **change):
    scenes = [{"split": part, "image_index": i, "image_filename": f"CLEVR_{part}_{i:06d}.png", "directions": {}, "relations": {},
               "objects": [{"color": "red", "shape": "cube", "3d_coords": [1, 2, 0.7], "pixel_coords": [240, 160, z]} for z in row]} for i, row in enumerate(depths)]
    for scene in scenes: picture(root / "images" / part / scene["image_filename"], (scene["image_index"], 7, 9))
    for scene in scenes: scene.update(change)
    path = root / "scenes" / f"CLEVR_{part}_scenes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {"split": part}, "scenes": scenes}))
    return path


def test_clevr(tmp_path):
    clevr(tmp_path / "CLEVR_v1.0", [[9.0, 12, 11], [8.0, 9, 10, 11], [8.001] + [20] * 9, [99.0, 100, 100], [9.6, 10.0, 14]])
    count, dist = ann.read_clevr_count(tmp_path, "test"), ann.read_clevr_dist(tmp_path / "CLEVR_v1.0", "test")
    assert count.classes == ("count_10", "count_3", "count_4", "count_5", "count_6", "count_7", "count_8", "count_9")
    assert count.labels.tolist() == [1, 2, 0, 1, 1] and count.labels.dtype == np.int64
    assert dist.classes == ("below_10.0", "below_100.0", "below_8.0", "below_8.5", "below_9.0", "below_9.5")
    assert [dist.classes[i] for i in dist.labels] == ["below_9.0", "below_8.0", "below_8.5", "below_100.0", "below_10.0"]
    assert count.names[2] == "images/val/CLEVR_val_000002.png"
    assert count.read(3).shape == (3, 10, 12) and count.read(3)[:, 5, 5].tolist() == [3, 7, 9]
    check_workers(dist)


@pytest.mark.parametrize("change, depths, message", [
    ({"image_filename": "../../../etc/x.png"}, [[9, 9, 9]], "leads out of"), ({"image_filename": "/etc/x.png"}, [[9, 9, 9]], None),
    ({}, [[9, 9]], "2 objects; CLEVR's have 3 to 10"), ({}, [[9] * 11], "11 objects"), ({"objects": 5}, [[9, 9, 9]], "TypeError")])
def test_clevr_that_is_not_clevr(change, depths, message, tmp_path):
    path = clevr(tmp_path, depths, **change)
    if message is None: assert ann.read_clevr_count(tmp_path, "test").names == ("images/val//etc/x.png",)     # stays below
    else:
        with pytest.raises(ValueError, match=message) as error: ann.read_clevr_count(tmp_path, "test")
        assert str(path) in str(error.value)


def test_damaged_scenes(tmp_path):
    path = clevr(tmp_path, [[9.0] * 3])
    whole = path.read_text()
    for text in (whole[:-20], whole.replace("9.0", "NaN"), whole.replace("9.0", "1e300"), "[" * 100_000, '{"scenes": 3}', "{}", "\x00\xff"):
        path.write_text(text)
        with pytest.raises(ValueError, match="CLEVR_val_scenes.json"): ann.read_clevr_dist(tmp_path, "test")


# ── KITTI ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

KITTI_LINE = "{} 0.00 0 -1.59 586.42 199.76 662.87 266.02 1.36 1.69 3.38 0.28 2.08 {} -1.58\n"


def kitti(root, labels):
    (root / "training/label_2").mkdir(parents=True)
    for i, objects in enumerate(labels):
        picture(root / f"training/image_2/{i:06d}.png", (i, 0, 0))
        (root / f"training/label_2/{i:06d}.txt").write_text("".join(KITTI_LINE.format(*o) for o in objects))


def test_kitti(tmp_path):
    kinds = {"no_vehicle": [("Pedestrian", 3.0), ("Tram", 5.0), ("DontCare", -1000)], "below_8": [("Car", 8.0), ("Van", 30.5)],
             "below_20": [("Cyclist", 1.0), ("Truck", 8.01)], "above_20": [("Car", 20.01)]}
    wanted = [list(kinds)[i % 4] for i in range(20)]
    kitti(tmp_path, [kinds[name] for name in wanted])
    train, test = ann.read_kitti_dist(tmp_path, "train"), ann.read_kitti_dist(tmp_path, "test")
    assert train.classes == test.classes == ("above_20", "below_20", "below_8", "no_vehicle")
    assert (len(train.names), len(test.names)) == (16, 4) and not set(train.names) & set(test.names)
    assert named(train) | named(test) == {f"training/image_2/{i:06d}.png": name for i, name in enumerate(wanted)}
    for i, name in enumerate(test.names): assert test.read(i)[0, 0, 0] == int(Path(name).stem)
    check_workers(test)


def test_a_car_behind_the_lens_is_no_vehicle(tmp_path):
    "VISSL's bins are cut at zero: this quirk is kept."
    kitti(tmp_path, [[("Car", -0.5)]] * 5)
    assert set(named(ann.read_kitti_dist(tmp_path, "train")).values()) == {"no_vehicle"}


@pytest.mark.parametrize("line, message", [("Car 0.00 0 -1.59 586.42\n", "5 columns"), (KITTI_LINE.format("Car", "nan"), "no number"), (KITTI_LINE.format("Car", "far"), "far")])
def test_kitti_damaged(line, message, tmp_path):
    kitti(tmp_path, [[("Car", 5.0)]] * 5)
    (tmp_path / "training/label_2/000003.txt").write_text(line)
    with pytest.raises(ValueError, match=f"000003.txt.*{message}"): ann.read_kitti_dist(tmp_path, "train")


def test_kitti_needs_both_files(tmp_path):
    kitti(tmp_path, [[("Car", 5.0)]] * 5)
    (tmp_path / "training/label_2/000002.txt").unlink()
    with pytest.raises(ValueError, match="000002 is in one of them only"): ann.read_kitti_dist(tmp_path, "train")


# ── small NORB ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

NORB = {"train": "smallnorb-5x46789x9x18x6x2x96x96-training", "test": "smallnorb-5x01235x9x18x6x2x96x96-testing"}


def matrix_bytes(array, magic=None, sizes=None):
    code = {"f4": 0x1E3D4C51, "f8": 0x1E3D4C53, "i4": 0x1E3D4C54, "u1": 0x1E3D4C55, "i2": 0x1E3D4C56}[array.dtype.str[1:]]
    sizes = sizes or (array.shape + (1, 1))[: max(3, array.ndim)]
    return struct.pack(f"<ii{len(sizes)}i", magic or code, array.ndim, *sizes) + array.tobytes()


def norb(root, info, split="test"):
    images = np.random.default_rng(len(info)).integers(0, 256, (len(info), 2, 96, 96), dtype=np.uint8)
    for name, array in (("dat", images), ("info", np.array(info, "<i4")), ("cat", np.zeros(len(info), "<i4"))):
        (root / f"{NORB[split]}-{name}.mat").write_bytes(matrix_bytes(array))
    return images


def test_small_norb(tmp_path):
    images = norb(tmp_path, [[4, 0, 0, 0], [6, 8, 34, 5], [7, 3, 10, 1], [9, 1, 2, 2], [9, 1, 20, 2]])
    side, high = ann.read_small_norb_azimuth(tmp_path, "test"), ann.read_small_norb_elevation(tmp_path, "test")
    assert high.classes == ("30", "35", "40", "45", "50", "55", "60", "65", "70") and high.labels.tolist() == [0, 8, 3, 1, 1]
    assert side.classes == ("0", "100", "120", "140", "160", "180", "20", "200", "220", "240", "260", "280", "300", "320", "340", "40", "60", "80")
    assert [side.classes[i] for i in side.labels] == ["0", "340", "100", "20", "200"]
    for i in range(5):
        for channel in side.read(i): assert np.array_equal(channel, images[i, 0])      # the first camera
    assert len(pickle.dumps(side.read)) < 2000 and side.names[1] == NORB["test"] + "-dat.mat[1]"
    check_workers(high)


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "u1", "i2"])
def test_every_kind_of_matrix(dtype, tmp_path):
    array = np.arange(24).reshape(4, 3, 2).astype(dtype)
    (tmp_path / "m").write_bytes(matrix_bytes(array))
    assert np.array_equal(ann.matrix_rows(ann.open_matrix(tmp_path / "m"), 1, 2), array[1:3])


@pytest.mark.parametrize("content, message", [
    (struct.pack("<6i", 0x1E3D4C55, 4, *[2**15] * 4), "promises 1,152,921,504,606,847,000 bytes"),
    (struct.pack("<10i", 0x1E3D4C53, 8, *[2**31 - 1] * 8), "promises"), (struct.pack("<2i", 0x1E3D4C55, 2**30), "1073741824 dimensions"),
    (struct.pack("<5i", 0x1E3D4C55, 3, -1, -5, 4) + bytes(20), "promises"), (struct.pack("<5i", 0x1E3D4C54, 2, 0, 4, 1), "promises"),
    (matrix_bytes(np.zeros((4, 4), np.uint8))[:-1], "the file has 35"), (matrix_bytes(np.zeros((4, 4), np.uint8)) + b"x", "the file has 37"),
    (struct.pack("<3i", 0x1E3D4C55, 3, 4), "buffer"), (b"", "buffer"), (gzip.compress(bytes(100)), "gunzip"), (b"MATLAB 5.0 MAT-file" * 9, "no binary matrix")])
def test_headers_are_not_believed(content, message, tmp_path):
    (tmp_path / "m.mat").write_bytes(content)
    with pytest.raises(ValueError, match=f"m.mat: .*{message}"): ann.open_matrix(tmp_path / "m.mat")


def test_small_norb_that_does_not_fit(tmp_path):
    info = tmp_path / f"{NORB['test']}-info.mat"
    norb(tmp_path, [[4, 0, 0, 0], [6, 8, 34, 5]])
    for bad in ([[4, 9, 0, 0]] * 2, [[4, -1, 0, 0]] * 2):
        info.write_bytes(matrix_bytes(np.array(bad, "<i4")))
        with pytest.raises(ValueError, match="column 1 holds angles"): ann.read_small_norb_elevation(tmp_path, "test")
    for azimuth in (1, 36, -2):
        info.write_bytes(matrix_bytes(np.array([[4, 0, azimuth, 0]] * 2, "<i4")))
        with pytest.raises(ValueError, match="column 2 holds angles"): ann.read_small_norb_azimuth(tmp_path, "test")
    for bad in (np.zeros((3, 4), "<i4"), np.zeros((2, 5), "<i4"), np.zeros((2, 4), "<f4")):
        info.write_bytes(matrix_bytes(bad))
        with pytest.raises(ValueError, match="not those of small NORB"): ann.read_small_norb_azimuth(tmp_path, "test")


def test_a_matrix_that_shrinks(tmp_path):
    norb(tmp_path, [[4, 0, 0, 0], [6, 8, 34, 5]])
    data = ann.read_small_norb_azimuth(tmp_path, "test")
    path = tmp_path / f"{NORB['test']}-dat.mat"
    path.write_bytes(path.read_bytes()[:-10000])
    with pytest.raises(BadImage, match="become shorter"): data.read(1)


# ── dSprites ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


class Passenger:
    def __reduce__(self): return exec, ("import builtins; builtins.boarded = True",)


def sprites(n=600):
    rng = np.random.default_rng(3)
    latents = np.stack([rng.integers(0, size, n) for size in (1, 3, 6, 40, 32, 32)], 1)
    latents[:, 4], latents[:, 3] = np.arange(n) % 32, np.arange(n) // 2 % 40
    return rng.integers(0, 2, (n, 64, 64), dtype=np.uint8), latents.astype(np.int64)


def dsprites(root, images, latents, save=np.savez_compressed, **more):
    values = latents / [1, 1, 1, 39 / (2 * np.pi), 31, 31]
    save(root / DSPRITES, metadata=np.array({"author": Passenger()}, dtype=object), imgs=images, latents_classes=latents, latents_values=values, **more)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_dsprites(save, tmp_path):
    images, latents = sprites()
    dsprites(tmp_path, images, latents, save)
    for split, n in (("train", 480), ("test", 120)):
        place, turn, chosen = ann.read_dsprites_loc(tmp_path, split), ann.read_dsprites_orient(tmp_path, split), ann.four_fifths(600, split)
        assert place.classes[:4] == ("bin_0", "bin_1", "bin_10", "bin_11") and len(place.classes) == 16 and len(place.labels) == n
        assert place.names[5] == f"imgs[{chosen[5]}]"
        for i, k in enumerate(chosen):
            assert place.classes[place.labels[i]] == f"bin_{latents[k, 4] // 2}"
            assert turn.classes[turn.labels[i]] == f"bin_{min(15, int(latents[k, 3] / 39 * 16))}"
            image = turn.read(i)
            assert image.shape == (3, 64, 64) and all(np.array_equal(channel, images[k] * 255) for channel in image)
    check_workers(place)


def test_the_passenger_stays_outside(tmp_path):
    "The real archive holds a pickle. numpy runs it when it is asked for; the reader never opens it."
    dsprites(tmp_path, *sprites(20))
    ann.read_dsprites_loc(tmp_path, "train")
    assert not hasattr(builtins, "boarded")
    np.load(tmp_path / DSPRITES, allow_pickle=True)["metadata"]
    assert builtins.boarded                                                      # the trap is armed
    del builtins.boarded


def test_dsprites_keeps_no_pixels(tmp_path):
    images, latents = sprites(2000)
    images[:] = 0
    images[:, 20:30, 20:30] = 1
    dsprites(tmp_path, images, latents)
    assert len(pickle.dumps(ann.read_dsprites_loc(tmp_path, "train").read)) < images.nbytes / 200


def test_another_archive_is_read_again(tmp_path):
    images, latents = sprites(20)
    dsprites(tmp_path, images, latents)
    first = ann.read_dsprites_loc(tmp_path, "train").read(0)
    (tmp_path / DSPRITES).unlink()
    dsprites(tmp_path, 1 - images, latents)
    assert torch.equal(ann.read_dsprites_loc(tmp_path, "train").read(0), 255 - first)


def npy(array, shape=None, descr=None, version=b"\x01\x00", tail=""):
    "An .npy file with a header of our choice."
    header = f"{{'descr': '{descr or array.dtype.str}', 'fortran_order': False, 'shape': {shape or array.shape}, }}{tail}"
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + array.tobytes()


def zipped(root, method=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(root / DSPRITES, "w", method) as archive:
        for name, content in members.items(): archive.writestr(f"{name}.npy", content)


def test_a_header_of_python_2(tmp_path):
    images, latents = sprites(20)
    zipped(tmp_path, imgs=npy(images, "(20L, 64L, 64L)"), latents_classes=npy(latents, "(20L, 6L)"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ann.read_dsprites_loc(tmp_path, "train").labels) == 16


IMAGES, LATENTS = sprites(20)


@pytest.mark.parametrize("members, message", [
    ({"imgs": npy(IMAGES, f"({2**48}, 64, 64)")}, "promises 1,152,921,504,606,8.. ?.*the archive has"),
    ({"latents_classes": npy(LATENTS, f"({2**57}, 6)")}, "promises"),
    ({"imgs": npy(IMAGES.astype(np.float32))}, "imgs is float32"), ({"imgs": npy(IMAGES, descr="|O")}, "imgs is object"),
    ({"imgs": npy(IMAGES.reshape(20, 32, 128))}, "not uint8"), ({"latents_classes": npy(LATENTS.astype(np.int32))}, "int32"),
    ({"latents_classes": npy(LATENTS[:19])}, "20 images and latent classes of 19"), ({"imgs": npy(IMAGES * 255)}, "neither 0 nor 1"),
    ({"latents_classes": npy(LATENTS + 40)}, "latent classes that dSprites does not have"), ({"latents_classes": npy(LATENTS - 1)}, "does not have"),
    ({"imgs": None}, "imgs.npy"), ({"imgs": b"\x80\x04cos\nsystem\n"}, "magic"), ({"imgs": npy(IMAGES, "__import__('os').getpid()")}, "malformed|parse"),
    ({"imgs": npy(np.zeros((0, 64, 64), np.uint8)), "latents_classes": npy(np.zeros((0, 6), np.int64))}, "0 images")])
def test_dsprites_that_is_not_dsprites(members, message, tmp_path):
    members = {"imgs": npy(IMAGES), "latents_classes": npy(LATENTS)} | members
    zipped(tmp_path, **{k: v for k, v in members.items() if v is not None})
    with pytest.raises(ValueError, match=message) as error: ann.read_dsprites_loc(tmp_path, "train")
    assert DSPRITES in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_only_what_numpy_writes(method, tmp_path):
    "LZMA's header may ask for gigabytes of memory."
    zipped(tmp_path, method, imgs=npy(IMAGES), latents_classes=npy(LATENTS))
    with pytest.raises(ValueError, match="numpy never uses"): ann.read_dsprites_loc(tmp_path, "train")


def test_damaged_archives(tmp_path):
    path = tmp_path / DSPRITES
    dsprites(tmp_path, *sprites(300), save=np.savez)
    whole = path.read_bytes()
    place = whole.index(b"imgs.npy") + 5000
    for content in (whole[:-30], whole[:1000], b"", b"PK\x03\x04" + bytes(50), whole[:place] + bytes([1 - whole[place]]) + whole[place + 1:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=DSPRITES): ann.read_dsprites_loc(tmp_path, "train")


@pytest.mark.parametrize("member", ["imgs", "latents_classes"])
def test_the_checksum_is_looked_at(member, tmp_path):
    zipped(tmp_path, imgs=npy(IMAGES), latents_classes=npy(LATENTS))
    path = tmp_path / DSPRITES
    checksum = struct.pack("<I", zipfile.ZipFile(path).getinfo(f"{member}.npy").CRC)
    path.write_bytes(path.read_bytes().replace(checksum, bytes(4)))
    with pytest.raises(ValueError, match=f"{DSPRITES}.*Bad CRC-32"): ann.read_dsprites_loc(tmp_path, "train")


def test_a_stream_that_ends_before_its_size(tmp_path):
    "The zip's directory repeats the lie of the header; the stream does not hold what both promise."
    content = npy(IMAGES, "(400, 64, 64)")
    zipped(tmp_path, imgs=content, latents_classes=npy(sprites(400)[1]))
    path, size = tmp_path / DSPRITES, len(content) + 380 * 4096
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", len(content)), struct.pack("<I", size)))
    with pytest.raises(ValueError, match=DSPRITES): ann.read_dsprites_loc(tmp_path, "train")


# ── PatchCamelyon ────────────────────────────────────────────────────────────────────────────────────────────────────────────

h5py = pytest.importorskip("h5py")


def pcam(root, split="valid", x=None, y=None, **options):
    x = np.random.default_rng(5).integers(0, 256, (6, 96, 96, 3), dtype=np.uint8) if x is None else x
    y = np.array([0, 1, 1, 0, 0, 1], np.uint8).reshape(6, 1, 1, 1) if y is None else y
    for key, array in (("x", x), ("y", y)):
        with h5py.File(root / f"camelyonpatch_level_2_split_{split}_{key}.h5", "w") as file: file.create_dataset(key, data=array, **options)
    return x


@pytest.mark.parametrize("options", [{}, {"chunks": True, "compression": "gzip"}])
def test_patch_camelyon(options, tmp_path):
    pcam(tmp_path, "train", **options)
    images = pcam(tmp_path, "valid", **options)
    pcam(tmp_path, "test", y=np.ones((6, 1, 1, 1), np.uint8), **options)
    data = ann.read_patch_camelyon(tmp_path, "test")
    assert data.classes == ("no_tumor", "tumor") and data.labels.tolist() == [0, 1, 1, 0, 0, 1] and data.labels.dtype == np.int64
    assert np.array_equal(data.read(4).permute(1, 2, 0), images[4]) and data.names[4] == "camelyonpatch_level_2_split_valid_x.h5[4]"
    assert ann.read_patch_camelyon(tmp_path, "official_test").labels.tolist() == [1] * 6
    assert ann.read_patch_camelyon(tmp_path, "train").names[0] == "camelyonpatch_level_2_split_train_x.h5[0]"
    check_workers(data)


@pytest.mark.parametrize("change, message", [
    ({"x": np.zeros((5, 96, 96, 3), np.uint8)}, "5 images and 6 labels"), ({"x": np.zeros((6, 96, 96), np.uint8)}, "not uint8"),
    ({"x": np.zeros((6, 96, 96, 3), np.float32)}, "float32"), ({"y": np.full((6, 1, 1, 1), 2, np.uint8)}, "neither 0 nor 1")])
def test_patch_camelyon_of_another_kind(change, message, tmp_path):
    pcam(tmp_path, **change)
    with pytest.raises(ValueError, match=message): ann.read_patch_camelyon(tmp_path, "test")


def test_hostile_h5(tmp_path):
    pcam(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(6))
    path = tmp_path / "camelyonpatch_level_2_split_valid_y.h5"

    def lies_outside(file): file.create_dataset("y", (6, 1, 1, 1), "u1", external=[(str(secret), 0, 6)])
    def is_virtual(file):
        layout = h5py.VirtualLayout((6, 1, 1, 1), "u1")
        layout[:] = h5py.VirtualSource(str(tmp_path / "camelyonpatch_level_2_split_valid_x.h5"), "y", (6, 1, 1, 1))
        file.create_virtual_dataset("y", layout)
    def links(file): file["y"] = h5py.ExternalLink("camelyonpatch_level_2_split_valid_x.h5", "x")
    def links_softly(file): file["y"] = h5py.SoftLink("/z")
    def is_huge(file): file.create_dataset("y", (2**50, 1, 1, 1), "u1", chunks=(2**20, 1, 1, 1))
    def has_huge_pieces(file): file.create_dataset("y", (6, 1, 1, 1), "u1", chunks=(2**30, 1, 1, 1), maxshape=(None, 1, 1, 1), compression="gzip")
    def is_a_group(file): file.create_group("y")
    def is_empty(file): pass

    for write, message in ((lies_outside, "not in this file"), (is_virtual, "not in this file"), (links, "a link"), (links_softly, "a link"),
                           (is_huge, "too much"), (has_huge_pieces, "too much"), (is_a_group, "not in this file"), (is_empty, "is missing")):
        with h5py.File(path, "w") as file: write(file)
        with pytest.raises(ValueError, match=f"valid_y.h5: .*{message}"): ann.read_patch_camelyon(tmp_path, "test")
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match="valid_y.h5"): ann.read_patch_camelyon(tmp_path, "test")


# ── class folders ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_euro_sat(tmp_path):
    for name, n in (("SeaLake", 1502), ("AnnualCrop", 1500)):
        (tmp_path / "2750" / name).mkdir(parents=True)
        for k in range(1, n + 1): (tmp_path / "2750" / name / f"{name}_{k}.jpg").touch()
    picture(tmp_path / "2750/SeaLake/SeaLake_1.jpg", (0, 0, 200), (64, 64))
    train, test = ann.read_euro_sat(tmp_path, "train"), ann.read_euro_sat(tmp_path / "2750", "test")
    assert train.classes == ("AnnualCrop", "SeaLake") and np.bincount(train.labels).tolist() == [1000, 1000] and np.bincount(test.labels).tolist() == [500, 500]
    by_text = sorted(f"SeaLake/SeaLake_{k}.jpg" for k in range(1, 1503))
    assert list(train.names[1000:]) == by_text[:1000] and list(test.names[500:]) == by_text[1000:1500]
    assert train.read(1000).shape == (3, 64, 64) and train.read(1000)[2].float().mean() == pytest.approx(200, abs=3)
    (tmp_path / "2750/AnnualCrop/AnnualCrop_7.jpg").unlink()
    with pytest.raises(ValueError, match="AnnualCrop holds 1499 images, the split takes 1500"): ann.read_euro_sat(tmp_path, "train")


def test_resisc45(tmp_path):
    "One generator for all classes; Random(42) shuffles ten numbers to 7 3 2 8 5 6 9 4 0 1 and then to 3 5 2 4 1 8 7 0 6 9."
    for name in ("beach", "airport"):
        for k in range(10): picture(tmp_path / f"NWPU-RESISC45/{name}/{name}_{k:03d}.jpg", (k, 0, 0))
    (tmp_path / "NWPU-RESISC45/airport/Thumbs.db").touch()
    train, test = ann.read_resisc45(tmp_path, "train"), ann.read_resisc45(tmp_path, "test")
    assert train.classes == ("airport", "beach") and train.labels.tolist() == [0] * 8 + [1] * 8 and test.labels.tolist() == [0, 0, 1, 1]
    assert test.names == ("airport/airport_000.jpg", "airport/airport_001.jpg", "beach/beach_006.jpg", "beach/beach_009.jpg")
    assert not set(train.names) & set(test.names)
    check_workers(test)


def test_no_class_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="CLASS is missing"): ann.read_resisc45(tmp_path, "train")


# ── films ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_ucf101(tmp_path):
    (tmp_path / "ucfTrainTestlist").mkdir()
    films = {"train": ["YoYo/v_YoYo_g08_c01.avi 101", "HandstandPushups/v_HandStandPushups_g01_c04.avi 37", "Archery/v_Archery_g08_c02.avi 3"],
             "test": ["YoYo/v_YoYo_g01_c01.avi", "Archery/v_Archery_g01_c01.avi", "Archery/v_Archery_g01_c02.avi"]}
    for split, lines in films.items(): (tmp_path / f"ucfTrainTestlist/{split}list01.txt").write_text("\n".join(lines) + "\n\n")
    for k in range(1, 12): picture(tmp_path / f"UCF-101/YoYo/v_YoYo_g01_c01/{k}.png", (k, 0, 0))                 # 1.png … 11.png
    for k in range(3): picture(tmp_path / f"UCF-101/Archery/v_Archery_g01_c01/{k:05d}.png", (k, 5, 0))
    picture(tmp_path / "UCF-101/Archery/v_Archery_g01_c02/only.png", (77, 0, 0))
    train, test = ann.read_ucf101(tmp_path, "train"), ann.read_ucf101(tmp_path, "test")
    assert train.classes == test.classes == ("Archery", "HandstandPushups", "YoYo")
    assert train.labels.tolist() == [2, 1, 0] and test.labels.tolist() == [2, 0, 0] and test.names[0] == "UCF-101/YoYo/v_YoYo_g01_c01"
    assert [test.read(i)[0, 0, 0].item() for i in range(3)] == [7, 2, 77]       # index 11 // 2 + 1 = 6 is 7.png; 3 frames: the last; one frame: that one
    with pytest.raises(BadImage, match="v_YoYo_g08_c01: were its frames extracted"): train.read(0)
    check_workers(test)


@pytest.mark.parametrize("line, message", [("../../secret/x.avi 1", "leads out of"), ("/etc/passwd 1", "leads out of"), ("v_YoYo.avi 1", "not CLASS/FILM")])
def test_ucf101_lists_from_strangers(line, message, tmp_path):
    (tmp_path / "ucfTrainTestlist").mkdir()
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").write_text(line)
    with pytest.raises(ValueError, match=f"trainlist01.txt: .*{message}"): ann.read_ucf101(tmp_path, "train")


def test_ucf101_class_without_training(tmp_path):
    (tmp_path / "ucfTrainTestlist").mkdir()
    for split, name in (("train", "A"), ("test", "B")): (tmp_path / f"ucfTrainTestlist/{split}list01.txt").write_text(f"{name}/v.avi 1")
    with pytest.raises(ValueError, match="testlist01.txt: .*'B'"): ann.read_ucf101(tmp_path, "test")


def test_kinetics(tmp_path):
    picture(tmp_path / "val/zumba/a_1_11.jpg", (0, 0, 250), size=(32, 32))
    for k in range(4): picture(tmp_path / f"val/baking (a) cake/b_0_10/{k:03d}.png", (k, 0, 0))
    picture(tmp_path / "train/zumba/c_0_10.jpg", (0, 0, 0))
    picture(tmp_path / "train/(abc) def/c.jpg", (0, 0, 0))
    (tmp_path / "val/zumba/d_0_10.mp4").touch()                                  # no frame of it
    data = ann.read_kinetics700(tmp_path, "test")
    assert data.classes == ("abc_def", "baking_a_cake", "zumba") == ann.read_kinetics700(tmp_path, "train").classes
    assert named(data) == {"val/baking (a) cake/b_0_10": "baking_a_cake", "val/zumba/a_1_11": "zumba"}
    assert data.read(0)[0, 0, 0] == 3 and data.read(1)[2].float().mean() > 240
    assert data.labels.dtype == np.int64


def test_kinetics_without_frames(tmp_path):
    for part in ("train", "val"): (tmp_path / part / "zumba").mkdir(parents=True)
    (tmp_path / "train/zumba/a.mp4").touch()
    with pytest.raises(ValueError, match="were the frames extracted"): ann.read_kinetics700(tmp_path, "train")


# ── lists ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def wilds(root, rows, categories=((0, 0, "empty"), (1, 2, "tayassu pecari"), (2, 3, "panthera onca"))):
    with open(root / "categories.csv", "w", newline="") as file: csv.writer(file).writerows([("y", "category_id", "name"), *categories])
    columns = ("", "split", "category_id", "datetime", "filename", "image_id", "location", "y", "location_remapped")
    with open(root / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([(i, split, 5, "2013-06-05 05:44:19", name, "8b02", 20, y, 11) for i, (split, name, y) in enumerate(rows)])


def test_wilds(tmp_path):
    rows = [("train", "a.jpg", 0), ("val", "b.jpg", 1), ("test", "c.jpg", 2), ("id_val", "d.jpg", 1), ("id_test", "e.jpg", 0), ("test", "f.jpg", 1)]
    wilds(tmp_path, rows)
    for _, name, y in rows: picture(tmp_path / "train" / name, (0, 100 * y, 0), (24, 16))
    for split in ("train", "val", "test", "id_val", "id_test"):
        data = ann.read_wilds_iwildcam(tmp_path, split)
        assert data.classes == ("empty", "tayassu pecari", "panthera onca")
        assert list(zip(data.names, data.labels)) == [(f"train/{name}", y) for s, name, y in rows if s == split]
        assert data.read(0).shape == (3, 16, 24) and data.read(0)[1].float().mean() == pytest.approx(100 * data.labels[0], abs=3)


@pytest.mark.parametrize("rows, message", [([("train", "../../x.jpg", 0)], "leads out of"), ([("train", "a.jpg", 3)], "class 3 is not"), ([("train", "a.jpg", "?")], "'\\?'"),
                                           ([("val", "a.jpg", 0)], "no row has the split 'train'"), ([("train", "a.jpg", -1)], "class -1 is not")])
def test_wilds_lists_from_strangers(rows, message, tmp_path):
    wilds(tmp_path, rows)
    with pytest.raises(ValueError, match=f"metadata.csv: .*{message}"): ann.read_wilds_iwildcam(tmp_path, "train")


def test_wilds_categories(tmp_path):
    wilds(tmp_path, [("train", "a.jpg", 2)], [(0, 0, "empty"), (2, 3, "jaguar"), (10**12, 9, "bomb")])
    assert ann.read_wilds_iwildcam(tmp_path, "train").classes == ("empty", "class_1", "jaguar")
    (tmp_path / "metadata.csv").write_text("split,filename\ntrain,a.jpg\n")
    with pytest.raises(ValueError, match="KeyError: 'y'"): ann.read_wilds_iwildcam(tmp_path, "train")


def memes(path, rows): path.write_text("".join(json.dumps({"id": i, "text": "look", **row}) + "\n" for i, row in enumerate(rows)))


def test_hateful_memes(tmp_path):
    memes(tmp_path / "train.jsonl", [{"img": "img/00001.png", "label": 1}, {"img": "img/00002.png", "label": 0}])
    memes(tmp_path / "dev.jsonl", [{"img": "img/00003.png", "label": 1}])
    for k in (1, 2): picture(tmp_path / f"img/{k:05d}.png", (k, 0, 0))
    train = ann.read_hateful_memes(tmp_path, "train")
    assert train.classes == ("not_hateful", "hateful") and train.labels.tolist() == [1, 0] and train.read(1)[0, 0, 0] == 2
    assert ann.read_hateful_memes(tmp_path, "test").names == ("img/00003.png",)
    memes(tmp_path / "dev_seen.jsonl", [{"img": "img/00004.png", "label": 0}])
    assert ann.read_hateful_memes(tmp_path, "test").names == ("img/00004.png",)
    with pytest.raises(BadImage, match="img/00003.png|img/00004.png"): ann.read_hateful_memes(tmp_path, "test").read(0)
    check_workers(train)


@pytest.mark.parametrize("row, message", [({"img": "../x.png", "label": 1}, "leads out of"), ({"img": "/etc/x.png", "label": 1}, "leads out of"), ({"img": "a.png", "label": 2}, "label is 2"),
                                          ({"img": "a.png"}, "KeyError: 'label'"), ({"img": 5, "label": 1}, "TypeError")])
def test_memes_from_strangers(row, message, tmp_path):
    memes(tmp_path / "train.jsonl", [row])
    with pytest.raises(ValueError, match=f"train.jsonl: .*{message}"): ann.read_hateful_memes(tmp_path, "train")


def test_memes_cut_short(tmp_path):
    memes(tmp_path / "train.jsonl", [{"img": "a.png", "label": 1}] * 2)
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text()[:-5])
    with pytest.raises(ValueError, match="train.jsonl"): ann.read_hateful_memes(tmp_path, "train")


def openimages(root, claims, classes, name="test-annotations-human-imagelabels.csv"):
    (root / "oidv6-classes-trainable.txt").write_text("\n".join(classes) + "\n")
    with open(root / name, "w") as file:
        file.write("ImageID,Source,LabelName,Confidence\n")
        for image, label, confidence in claims: file.write(f"{image},verification,{label},{confidence}\n")


def test_openimages_against_a_plain_loop(tmp_path):
    "9,605 classes, some of them asked about; a plain dictionary of claims says what should come out."
    rng = np.random.default_rng(7)
    classes = [f"/m/{k:05x}" for k in range(9605)]
    claims = [(f"{rng.integers(40):016x}", f"/m/{rng.integers(9000, 9700):05x}", int(rng.integers(2))) for _ in range(600)]
    openimages(tmp_path, claims, classes)
    wanted = {}
    for image, label, confidence in claims:
        if label in set(classes): wanted[image, label] = max(confidence, wanted.get((image, label), 0))
    images = sorted({image for image, _ in wanted})
    dense = np.full((len(images), 9605), -1, np.int8)
    for (image, label), value in wanted.items(): dense[images.index(image), classes.index(label)] = value
    data = ann.read_openimages(tmp_path, "test")
    assert data.classes == tuple(classes) and data.names == tuple(f"test/{image}.jpg" for image in images)
    assert data.labels.shape == dense.shape and np.array_equal(np.asarray(data.labels), dense)
    picture(tmp_path / data.names[3], (200, 0, 0))
    assert data.read(3).shape == (3, 10, 12)


def test_openimages_parts(tmp_path):
    for split, name in (("train", "oidv6-train-annotations-human-imagelabels.csv"), ("validation", "validation-annotations-human-imagelabels.csv")):
        openimages(tmp_path, [("0001", "/m/1", 1)], ["/m/1"], name)
        assert ann.read_openimages(tmp_path, split).names == (f"{split}/0001.jpg",)


@pytest.mark.parametrize("claims, message", [([("../../x", "/m/1", 1)], "leads out of"), ([("a", "/m/1", "yes")], "annotations"), ([("a", "", 1)], "not complete"), ([("", "/m/1", 1)], "not complete")])
def test_openimages_from_strangers(claims, message, tmp_path):
    openimages(tmp_path, claims, ["/m/1"])
    with pytest.raises(ValueError, match=f"test-annotations-human-imagelabels.csv: .*{message}|could not convert"): ann.read_openimages(tmp_path, "test")


def test_openimages_damaged(tmp_path):
    openimages(tmp_path, [("a", "/m/1", 1)], ["/m/1", "/m/1"])
    with pytest.raises(ValueError, match="trainable.txt: .*twice"): ann.read_openimages(tmp_path, "test")
    openimages(tmp_path, [("a", "/m/1", 1)], ["/m/1"])
    (tmp_path / "test-annotations-human-imagelabels.csv").write_text("ImageID,Source,LabelName,Confidence\na,verification,/m/1,1\nb,verif")
    with pytest.raises(ValueError, match="not complete"): ann.read_openimages(tmp_path, "test")
    (tmp_path / "test-annotations-human-imagelabels.csv").write_text("id,label\n")
    with pytest.raises(ValueError, match="imagelabels.csv"): ann.read_openimages(tmp_path, "test")


def test_claims_index_like_an_array():
    dense = np.array([[1, -1, 0, -1], [-1, -1, -1, -1], [-1, 0, 1, 1]], np.int8)
    claims = ann.Claims(np.array([0, 2, 2, 5]), [0, 2, 1, 2, 3], [1, 0, 0, 1, 1], 4)
    for rows in (0, -1, slice(None), slice(2, 0, -1), [2, 0], np.array([True, False, True]), np.array([[0, 1], [2, 2]]), []):
        rows = np.array(rows, np.int64) if isinstance(rows, list) else rows
        assert np.array_equal(claims[rows], dense[rows]) and claims[rows].shape == dense[rows].shape and claims[rows].dtype == np.int8
    assert np.array_equal(np.asarray(claims, np.int64), dense) and np.array_equal(np.asarray(pickle.loads(pickle.dumps(claims))), dense)
    assert len(claims) == 3 and claims.shape == (3, 4)
    with pytest.raises(IndexError): claims[3]
