"Every reader reads a tiny copy of its data set in the layout of the download; labels, order of classes and splits are written down by hand."
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from seer_nb.evaluate import readers, tasks
from seer_nb.images import BadImage

scipy_io = pytest.importorskip("scipy.io")
ELEPHANT, TENCH, TISSUE = "n02504458", "n01440764", "n15075141"   # 386, 0, 999


def put(path, size=(10, 12), colour=(200, 30, 60)):
    "Write an image of one colour; size is height, width."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], colour).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def table(**columns):
    "A MATLAB struct array as scipy writes it."
    rows = np.zeros(len(next(iter(columns.values()))), dtype=[(name, "O") for name in columns])
    for name, values in columns.items(): rows[name] = values
    return rows


# ── one builder per data set: makes root, returns (classes or None, {split: (names, labels)}) ────────────────────────────────

def imagenet1k(root):
    for wnid, n in ((ELEPHANT, 1), (TENCH, 2), (TISSUE, 1)):
        for i in range(n): put(root / f"train/{wnid}/{wnid}_{i}.JPEG")
    put(root / f"val/{ELEPHANT}/ILSVRC2012_val_00000001.JPEG")
    write(root / "val/README.txt", "not an image")
    return None, {"train": ([f"{TENCH}/{TENCH}_0.JPEG", f"{TENCH}/{TENCH}_1.JPEG", f"{ELEPHANT}/{ELEPHANT}_0.JPEG", f"{TISSUE}/{TISSUE}_0.JPEG"], [0, 0, 386, 999]),
                  "test": ([f"{ELEPHANT}/ILSVRC2012_val_00000001.JPEG"], [386])}


def imagenet_a(root):
    put(root / f"imagenet-a/{TISSUE}/0.99_tissue.jpg")
    put(root / f"imagenet-a/{TENCH}/0.01_fish.jpg")
    write(root / "imagenet-a/README.txt", "200 classes")
    return None, {"test": ([f"{TENCH}/0.01_fish.jpg", f"{TISSUE}/0.99_tissue.jpg"], [0, 999])}


def imagenet_r(root):
    put(root / f"imagenet-r/{ELEPHANT}/art_0.jpg")
    return None, {"test": ([f"{ELEPHANT}/art_0.jpg"], [386])}


def imagenet_sketch(root):
    put(root / f"sketch/{ELEPHANT}/sketch_1.JPEG")
    return None, {"test": ([f"{ELEPHANT}/sketch_1.JPEG"], [386])}


def imagenet_v2(root):
    for k in (0, 2, 10, 999): put(root / f"imagenetv2-matched-frequency-format-val/{k}/x.jpeg")
    return None, {"test": (["0/x.jpeg", "10/x.jpeg", "2/x.jpeg", "999/x.jpeg"], [0, 10, 2, 999])}


def imagenet_real(root):
    for wnid, i in ((TISSUE, 1), (ELEPHANT, 3), (TENCH, 2)): put(root / f"val/{wnid}/ILSVRC2012_val_0000000{i}.JPEG")
    write(root / "real.json", "[[999, 7], [], [386]]")
    labels = np.zeros((3, 1000), int)
    labels[0, [7, 999]] = labels[2, 386] = 1
    return None, {"test": ([f"{TISSUE}/ILSVRC2012_val_00000001.JPEG", f"{TENCH}/ILSVRC2012_val_00000002.JPEG", f"{ELEPHANT}/ILSVRC2012_val_00000003.JPEG"], labels)}


def objectnet(root):
    for folder in ("alarm_clock", "air_freshener"): put(root / f"objectnet-1.0/images/{folder}/a.png", (14, 16), (255, 0, 0))
    maps = root / "objectnet-1.0/mappings"
    write(maps / "folder_to_objectnet_label.json", '{"air_freshener": "Air freshener", "alarm_clock": "Alarm clock"}')
    write(maps / "objectnet_to_imagenet_1k.json", '{"Alarm clock": "analog clock; digital clock"}')
    write(maps / "pytorch_to_imagenet_2012_id.json", '{"409": 2, "530": 0, "0": 1}')
    write(maps / "imagenet_to_label_2012_v2", "digital clock\ntench, Tinca tinca\nanalog clock\nnever listed\n")
    labels = np.zeros((1, 1000), int)
    labels[0, [409, 530]] = 1
    return None, {"test": (["alarm_clock/a.png"], labels)}


def places205(root):
    images, lists = root / "data/vision/torralba/deeplearning/images256", root / "trainvalsplit_places205"
    for name in ("a/abbey/1", "a/apartment_building/outdoor/2", "b/bar/3", "a/abbey/4"): put(images / f"{name}.jpg")
    write(lists / "train_places205.csv", "b/bar/3.jpg 2\na/abbey/1.jpg 0\na/apartment_building/outdoor/2.jpg 1\n")
    write(lists / "val_places205.csv", "a/abbey/4.jpg 0\n")
    return None, {"train": (["b/bar/3.jpg", "a/abbey/1.jpg", "a/apartment_building/outdoor/2.jpg"], [2, 0, 1]), "test": (["a/abbey/4.jpg"], [0])}


def inaturalist18(root):
    names = [f"train_val2018/Plantae/{k}/{k}.jpg" for k in (10, 2, 0)]
    for name in names: put(root / name)
    categories = [{"id": k, "name": f"species {k}"} for k in (10, *range(10))]
    for file, keep in (("train2018.json", (0, 1)), ("val2018.json", (2,))):
        write(root / file, json.dumps({"images": [{"id": 100 + i, "file_name": names[i]} for i in keep], "categories": categories,
                                       "annotations": [{"image_id": 100 + i, "category_id": (10, 2, 0)[i]} for i in reversed(keep)]}))
    return [f"species {k}" for k in range(11)], {"train": (names[:2], [10, 2]), "test": (names[2:], [0])}


def oxford_flowers(root):
    for i in range(1, 6): put(root / f"jpg/image_{i:05d}.jpg")
    scipy_io.savemat(root / "setid.mat", {"trnid": np.array([[5, 1]]), "valid": np.array([[2]]), "tstid": np.array([[4, 3]])})
    scipy_io.savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 10]], np.uint8)})
    return [str(k) for k in range(1, 103)], {"train": (["image_00005.jpg", "image_00001.jpg", "image_00002.jpg"], [9, 76, 0]),
                                             "test": (["image_00004.jpg", "image_00003.jpg"], [4, 101])}


def sun397(root):
    for i in range(10):
        put(root / f"SUN397/z/zen_garden/sun_{i}.jpg")
        put(root / f"SUN397/a/apartment_building/outdoor/sun_{i}.jpg")
    write(root / "SUN397/ClassName.txt", "/a/apartment_building/outdoor\n/z/zen_garden\n")
    return ["apartment_building/outdoor", "zen_garden"], {"train": (None, [0] * 7 + [1] * 7), "test": (None, [0] * 2 + [1] * 2)}


def food101(root):
    for name in ("waffles/3", "waffles/1", "apple_pie/2"): put(root / f"food-101/images/{name}.jpg")
    write(root / "food-101/meta/train.json", '{"waffles": ["waffles/3"], "apple_pie": ["apple_pie/2"]}')
    write(root / "food-101/meta/test.json", '{"waffles": ["waffles/1"], "apple_pie": []}')
    return ["apple_pie", "waffles"], {"train": (["food-101/images/waffles/3.jpg", "food-101/images/apple_pie/2.jpg"], [1, 0]), "test": (["food-101/images/waffles/1.jpg"], [1])}


def caltech101(root):
    for name, n in (("accordion", 31), ("BACKGROUND_Google", 32)):
        for i in range(n): put(root / f"101_ObjectCategories/{name}/image_{i + 1:04d}.jpg")
    (root / "101_ObjectCategories/BACKGROUND_Google/tmp").write_bytes(b"left behind")
    return ["BACKGROUND_Google", "accordion"], {"train": (None, [0] * 30 + [1] * 30), "test": (None, [0, 0, 1])}


def oxford_pets(root):
    for name in ("Abyssinian_1", "american_bulldog_2", "Sphynx_3"): put(root / f"images/{name}.jpg")
    write(root / "annotations/trainval.txt", "american_bulldog_2 2 2 1\nSphynx_3 34 1 12\nAbyssinian_1 1 1 1\n")
    write(root / "annotations/test.txt", "#Image CLASS-ID SPECIES BREED ID\nSphynx_3 34 1 12\nAbyssinian_1 1 1 1\namerican_bulldog_2 2 2 1\n")
    return ["Abyssinian", "Sphynx", "american_bulldog"], {"train": (["american_bulldog_2.jpg", "Sphynx_3.jpg", "Abyssinian_1.jpg"], [2, 1, 0]),
                                                          "test": (["Sphynx_3.jpg", "Abyssinian_1.jpg", "american_bulldog_2.jpg"], [1, 0, 2])}


def stanford_cars(root):
    for name in ("cars_train/00001", "cars_train/00002", "cars_test/00001"): put(root / f"{name}.jpg")
    (root / "devkit").mkdir()
    scipy_io.savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], object)})
    scipy_io.savemat(root / "devkit/cars_train_annos.mat", {"annotations": table(bbox_x1=[1, 1], **{"class": [2, 1]}, fname=["00001.jpg", "00002.jpg"])})
    scipy_io.savemat(root / "cars_test_annos_withlabels.mat", {"annotations": table(bbox_x1=[1], **{"class": [2]}, fname=["00001.jpg"])})
    return ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], {"train": (["00001.jpg", "00002.jpg"], [1, 0]), "test": (["00001.jpg"], [1])}


def cifar10(root):
    (folder := root / "cifar-10-batches-py").mkdir(parents=True)
    for b, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        pixels = np.repeat(np.arange(3, dtype=np.uint8) * 10 + b, 1024)[None]   # red b, green 10 + b, blue 20 + b
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [9 - b], "filenames": ["x.png"]}, protocol=2))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}, protocol=2))
    return classes, {"train": (None, [9, 8, 7, 6, 5]), "test": (None, [4])}


def cifar100(root):
    (folder := root / "cifar-100-python").mkdir(parents=True)
    for name, fine in (("train", [99, 0]), ("test", [7])):
        (folder / name).write_bytes(pickle.dumps({"data": np.full((len(fine), 3072), 5, np.uint8), "fine_labels": fine, "coarse_labels": [1] * len(fine)}, protocol=2))
    classes = [f"class {k}" for k in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": classes}, protocol=2))
    return classes, {"train": (None, [99, 0]), "test": (None, [7])}


def stl10(root):
    (folder := root / "stl10_binary").mkdir(parents=True)
    write(folder / "class_names.txt", "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    for part, labels in (("train", [10, 1]), ("test", [3])):
        (folder / f"{part}_X.bin").write_bytes(np.zeros((len(labels), 3, 96, 96), np.uint8).tobytes())
        (folder / f"{part}_y.bin").write_bytes(np.array(labels, np.uint8).tobytes())
    return "airplane bird car cat deer dog horse monkey ship truck".split(), {"train": (None, [9, 0]), "test": (None, [2])}


def svhn(root):
    root.mkdir(parents=True)
    for part, labels in (("train", [10, 1, 9]), ("test", [2, 10])):
        scipy_io.savemat(root / f"{part}_32x32.mat", {"X": np.zeros((32, 32, 3, len(labels)), np.uint8), "y": np.array(labels, np.uint8)[:, None]})
    return list("0123456789"), {"train": (None, [0, 1, 9]), "test": (None, [2, 0])}


def mnist(root):
    (raw := root / "MNIST/raw").mkdir(parents=True)
    for part, labels in (("train", [5, 0, 4]), ("t10k", [7, 2])):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(np.array([0x803, len(labels), 28, 28], ">i4").tobytes() + bytes(len(labels) * 784))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, len(labels)], ">i4").tobytes() + bytes(labels))
    return list("0123456789"), {"train": (None, [5, 0, 4]), "test": (None, [7, 2])}


def gtsrb(root):
    for k, name in ((0, "00000_00000"), (0, "00000_00001"), (42, "00003_00000")): put(root / f"GTSRB/Training/{k:05d}/{name}.ppm")
    write(root / "GTSRB/Training/00042/GT-00042.csv", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n")
    for i in (0, 1): put(root / f"GTSRB/Final_Test/Images/{i:05d}.ppm")
    write(root / "GT-final_test.csv", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n00001.ppm;12;10;5;5;6;6;33\n00000.ppm;12;10;5;5;6;6;16\n")
    return [f"{k:05d}" for k in range(43)], {"train": (["Training/00000/00000_00000.ppm", "Training/00000/00000_00001.ppm", "Training/00042/00003_00000.ppm"], [0, 0, 42]),
                                             "test": (["00001.ppm", "00000.ppm"], [33, 16])}


def fgvc_aircrafts(root):
    data = root / "fgvc-aircraft-2013b/data"
    for name in ("0034309", "1025794"): put(data / f"images/{name}.jpg")
    write(data / "variants.txt", "707-320\nA340-200\nF/A-18\n")
    write(data / "images_variant_trainval.txt", "1025794 F/A-18\n")
    write(data / "images_variant_test.txt", "0034309 A340-200\n")
    return ["707-320", "A340-200", "F/A-18"], {"train": (["fgvc-aircraft-2013b/data/images/1025794.jpg"], [2]), "test": (["fgvc-aircraft-2013b/data/images/0034309.jpg"], [1])}


def dtd(root):
    for name in ("zigzagged/zigzagged_0001", "banded/banded_0002", "banded/banded_0003"): put(root / f"dtd/images/{name}.jpg")
    write(root / "dtd/labels/train1.txt", "zigzagged/zigzagged_0001.jpg\nbanded/banded_0002.jpg\n")
    write(root / "dtd/labels/val1.txt", "banded/banded_0009.jpg\n")
    write(root / "dtd/labels/test1.txt", "banded/banded_0003.jpg\n")
    return ["banded", "zigzagged"], {"train": (["zigzagged/zigzagged_0001.jpg", "banded/banded_0002.jpg"], [1, 0]), "test": (["banded/banded_0003.jpg"], [0])}


def voc07(root):
    top = root / "VOCdevkit/VOC2007"
    objects = {"000005": [("chair", 0), ("chair", 1)], "000007": [("car", 1)], "000001": [("dog", 0), ("person", 0), ("person", 1), ("sofa", 1)]}
    for name, found in objects.items():
        put(top / f"JPEGImages/{name}.jpg")
        part = "<part><name>head</name><bndbox/></part>"                         # persons have parts, with names of their own
        write(top / f"Annotations/{name}.xml", "<annotation><filename>x</filename>" + "".join(
            f"<object><name>{n}</name><difficult>{d}</difficult>{part}</object>" for n, d in found) + "</annotation>")
    write(top / "ImageSets/Main/trainval.txt", "000005\n000007\n")
    write(top / "ImageSets/Main/test.txt", "000001\n")
    row = lambda **present: [present.get(name, 0) for name in readers.VOC_CLASSES]
    return readers.VOC_CLASSES, {"train": (["000005.jpg", "000007.jpg"], [row(chair=1), row(car=-1)]), "test": (["000001.jpg"], [row(dog=1, person=1, sofa=-1)])}


BUILDERS = {f.__name__: f for f in (imagenet1k, imagenet_a, imagenet_r, imagenet_sketch, imagenet_v2, imagenet_real, objectnet, places205, inaturalist18, oxford_flowers,
                                    sun397, food101, caltech101, oxford_pets, stanford_cars, cifar10, cifar100, stl10, svhn, mnist, gtsrb, fgvc_aircrafts, dtd, voc07)}


@pytest.fixture
def any_md5(monkeypatch):
    "torchvision compares MD5 sums with those of the published files; a tiny copy has others."
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: readers.os.path.isfile(path))


def test_every_reader_has_a_builder():
    assert set(readers.READERS) == set(BUILDERS) | {"imagenet1k_1pct", "imagenet1k_10pct"}


@pytest.mark.parametrize("slug", list(BUILDERS))
def test_reads_the_download(slug, tmp_path, any_md5):
    classes, splits = BUILDERS[slug](tmp_path / slug)
    for split, (names, labels) in splits.items():
        data = tasks.open_task(slug, tmp_path, split)
        assert data.labels.tolist() == np.asarray(labels).tolist()
        assert data.labels.dtype == (torch.int8 if data.labels.ndim == 2 else torch.int64)
        if classes: assert list(data.classes) == list(classes)
        elif slug != "places205": assert len(data.classes) == 1000 and data.classes[386] == ELEPHANT
        if names: assert [data.name(i) for i in range(len(data))] == names
        assert len({data.name(i) for i in range(len(data))}) == len(data)
        for image, _ in data: assert image.dtype == torch.uint8 and image.shape[0] == 3
        again = pickle.loads(pickle.dumps(data))                                # workers of a loader get a copy
        assert torch.equal(again[0][0], data[0][0])
        view = tasks.train_transform(slug, size=32)(data[0][0], 0, 0, 0)
        assert tasks.eval_transform(slug, size=32).resize_crop(data[0][0]).shape == view.shape == (3, 32, 32)
    if "train" not in splits:
        with pytest.raises(ValueError, match="only a test split"): tasks.open_task(slug, tmp_path, "train")
        with pytest.raises(ValueError, match="only a test split"): readers.READERS[slug](tmp_path / slug, "train")
    else:
        with pytest.raises(ValueError, match="not 'val'"): readers.READERS[slug](tmp_path / slug, "val")


@pytest.mark.parametrize("slug", list(readers.READERS))
def test_missing(slug, tmp_path):
    "One message, at once: what, where to get it, licence, where it belongs. An empty folder is as good as none."
    (tmp_path / slug).mkdir()
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="(?s)is not there.*where to get it: .*licence: .*where it belongs: ") as error: tasks.open_task(slug, root, "test")
        assert tasks.ROWS[slug].get in str(error.value) and tasks.ROWS[slug].layout in str(error.value)


# ── what is particular to one of them ────────────────────────────────────────────────────────────────────────────────────────

def test_flat_validation_images(tmp_path):
    "The numbers of the development kit are not those of the sorted ids."
    for i in (1, 2, 3): put(tmp_path / f"imagenet1k/val/ILSVRC2012_val_0000000{i}.JPEG")
    kit = tmp_path / "imagenet1k/ILSVRC2012_devkit_t12/data"
    write(kit / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n490\n")
    scipy_io.savemat(kit / "meta.mat", {"synsets": table(ILSVRC2012_ID=[361, 490, 1001], WNID=[TENCH, ELEPHANT, "n00001740"])})
    assert tasks.open_task("imagenet1k", tmp_path, "test").labels.tolist() == [386, 0, 386]
    write(kit / "ILSVRC2012_validation_ground_truth.txt", "490\n361\n")
    with pytest.raises(ValueError, match="3 images, but 2 labels"): tasks.open_task("imagenet1k", tmp_path, "test")


def test_a_folder_that_is_no_class(tmp_path):
    put(tmp_path / "imagenet_r/imagenet-r/n00000001/a.jpg")
    with pytest.raises(ValueError, match="imagenet-r/n00000001 is not one of the 1000 classes"): tasks.open_task("imagenet_r", tmp_path, "test")


def test_lists_of_a_hundredth(tmp_path):
    imagenet1k(tmp_path / "imagenet1k")
    write(tmp_path / "imagenet1k/1percent.txt", f"{ELEPHANT}_0.JPEG\n{TENCH}_1.JPEG\n")
    data = tasks.open_task("imagenet1k_1pct", tmp_path, "train")
    assert data.labels.tolist() == [386, 0] and data[1][0].shape == (3, 10, 12)
    assert len(tasks.open_task("imagenet1k_1pct", tmp_path, "test")) == 1


def test_the_list_of_ids():
    names = readers.imagenet_classes()
    assert len(names) == 1000 and list(names) == sorted(names) and [names[w] for w in (TENCH, ELEPHANT, TISSUE)] == ["tench", "African elephant", "toilet tissue"]


def test_the_list_of_ids_agrees_with_timm():
    info = pytest.importorskip("timm.data").ImageNetInfo()
    assert list(readers.imagenet_classes()) == info.label_names()


STARTS = [["019", "018", "012", "049"], ["092", "084", "061", "058"], ["033", "061", "006", "036"]]   # of the first three classes


def test_the_seeded_order_never_changes():
    "Scores measured with one version must be comparable with those of the next, whatever NumPy does to its permutations."
    names = [f"{i:03d}" for i in range(100)]
    for k, start in enumerate(STARTS):
        order = readers.shuffled_names(names, k)
        assert order[:4] == start and sorted(order) == names
    assert readers.shuffled_names([], 0) == []


@pytest.mark.parametrize("slug", ["caltech101", "sun397"])
def test_drawn_splits(slug, tmp_path, monkeypatch):
    "Disjoint, the same from another copy whose files were written in another order, and another one with another seed."
    BUILDERS[slug](tmp_path / "a" / slug)
    monkeypatch.setattr(readers.os, "scandir", lambda path, real=readers.os.scandir: sorted(real(path), key=lambda e: e.name[::-1]))
    BUILDERS[slug](tmp_path / "b" / slug)
    split = {copy: [readers.READERS[slug](tmp_path / copy / slug, part).names for part in ("train", "test")] for copy in "ab"}
    assert split["a"] == split["b"] and not set(split["a"][0]) & set(split["a"][1])
    monkeypatch.setattr(readers, "SPLIT_SEED", 1)
    assert readers.READERS[slug](tmp_path / "a" / slug, "test").names != split["a"][1]


def test_the_frame_of_objectnet_is_cut(tmp_path):
    objectnet(tmp_path)
    path = tmp_path / "objectnet-1.0/images/alarm_clock/a.png"
    image = Image.new("RGB", (16, 14), (255, 0, 0))
    image.paste((0, 200, 0), (1, 1, 15, 13))
    image.save(path)
    cut = readers.read_objectnet(tmp_path, "test").read(0)
    assert cut.shape == (3, 12, 14) and cut[0].max() == 0 and cut[1].min() == 200


def test_pixels_of_packed_images(tmp_path, any_md5):
    "Channels and rows end up where they belong."
    cifar10(tmp_path / "cifar10")
    image, _ = tasks.open_task("cifar10", tmp_path, "test")[0]
    assert image.shape == (3, 32, 32) and image[:, 4, 20].tolist() == [5, 15, 25]
    stl10(tmp_path / "stl10")
    pixels = np.zeros((1, 3, 96, 96), np.uint8)
    pixels[0, 1, 90, 5] = 77                                                    # stored column by column
    (tmp_path / "stl10/stl10_binary/test_X.bin").write_bytes(pixels.tobytes())
    assert tasks.open_task("stl10", tmp_path, "test")[0][0].nonzero().tolist() == [[1, 5, 90]]
    svhn(tmp_path / "svhn")
    pixels = np.zeros((32, 32, 3, 1), np.uint8)
    pixels[30, 2, 0] = 9
    scipy_io.savemat(tmp_path / "svhn/test_32x32.mat", {"X": np.concatenate([pixels, pixels], 3), "y": np.array([[3], [4]], np.uint8)})
    assert tasks.open_task("svhn", tmp_path, "test")[1][0].nonzero().tolist() == [[0, 30, 2]]


# ── hostile and broken ───────────────────────────────────────────────────────────────────────────────────────────────────────

OUT = "../../../etc/passwd"
LISTS = {   # slug -> (the list, what to write there)
    "places205": ("trainvalsplit_places205/val_places205.csv", f"a/{OUT} 0\n"),
    "inaturalist18": ("val2018.json", json.dumps({"images": [{"id": 1, "file_name": OUT}], "annotations": [{"image_id": 1, "category_id": 0}], "categories": [{"id": 0, "name": "x"}]})),
    "food101": ("food-101/meta/test.json", json.dumps({"waffles": [f"waffles/../../{OUT}"]})),
    "oxford_pets": ("annotations/test.txt", f"{OUT}_1 1 1 1\n"),
    "fgvc_aircrafts": ("fgvc-aircraft-2013b/data/images_variant_test.txt", f"{OUT} A340-200\n"),
    "dtd": ("dtd/labels/test1.txt", f"banded/{OUT}\n"),
    "gtsrb": ("GT-final_test.csv", f"Filename;ClassId\n{OUT};3\n"),
    "voc07": ("VOCdevkit/VOC2007/ImageSets/Main/test.txt", f"{OUT}\n"),
    "sun397": ("SUN397/ClassName.txt", f"/a/{OUT}\n"),
}


@pytest.mark.parametrize("slug", list(LISTS))
def test_lists_cannot_lead_out(slug, tmp_path):
    BUILDERS[slug](tmp_path / slug)
    name, text = LISTS[slug]
    write(tmp_path / slug / name, text)
    with pytest.raises(ValueError, match="leads out|not in the subpath"): tasks.open_task(slug, tmp_path, "test")


@pytest.mark.parametrize("name", ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "a\\..\\..\\b.jpg", "a\0.jpg"])
def test_below(name):
    with pytest.raises(ValueError, match="leads out"): readers.below(["fine.jpg", name])
    assert readers.below(["a/b..jpg", "..a/b.jpg"]) == ("a/b..jpg", "..a/b.jpg")


def test_a_changed_pickle_is_not_opened(tmp_path):
    "A CIFAR batch is a program; only the published one is run."
    cifar10(tmp_path / "cifar10")
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "sprung"), "w"))
    (tmp_path / "cifar10/cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="not the published ones"): tasks.open_task("cifar10", tmp_path, "test")
    assert not (tmp_path / "sprung").exists()


def test_xml_with_entities_is_refused(tmp_path):
    voc07(tmp_path)
    bomb = "<!DOCTYPE lolz [<!ENTITY a 'lol'><!ENTITY b '&a;&a;&a;&a;'>]><annotation>&b;</annotation>"
    write(tmp_path / "VOCdevkit/VOC2007/Annotations/000001.xml", bomb)
    with pytest.raises(ValueError, match="not an annotation of VOC"): readers.read_voc07(tmp_path, "test")


def test_a_large_matlab_file_is_refused(tmp_path, monkeypatch):
    oxford_flowers(tmp_path)
    monkeypatch.setattr(readers, "MATLAB_LIMIT", 10)
    with pytest.raises(ValueError, match="more than 10 bytes"): readers.read_oxford_flowers(tmp_path, "test")


@pytest.mark.parametrize("slug, name", [("dtd", "dtd/images/banded/banded_0003.jpg"), ("gtsrb", "GTSRB/Final_Test/Images/00001.ppm")])
def test_broken_images_are_named(slug, name, tmp_path):
    BUILDERS[slug](tmp_path / slug)
    path, data = tmp_path / slug / name, tasks.open_task(slug, tmp_path, "test")
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 3], b"no image at all", b""):
        path.write_bytes(content)
        with pytest.raises(BadImage, match=path.name): data[0]
    path.unlink()
    with pytest.raises(BadImage, match=f"missing.*{path.name}"): data[0]


@pytest.mark.parametrize("side", [9000, 12_000, 40_000])
def test_a_ppm_bomb(side, tmp_path, recwarn):
    gtsrb(tmp_path)
    (tmp_path / "GTSRB/Final_Test/Images/00001.ppm").write_bytes(b"P6\n%d %d\n255\n" % (side, side))
    with pytest.raises(BadImage, match="too_large"): readers.read_gtsrb(tmp_path, "test").read(0)
    assert not recwarn.list


@pytest.mark.parametrize("slug", list(BUILDERS))
def test_damaged_lists(slug, tmp_path, any_md5):
    "Whatever is in a list, the error is one that names the task and its folder."
    BUILDERS[slug](tmp_path / slug)
    unread = {"README.txt", "val1.txt", "GT-00042.csv", "tmp", "pytorch_to_imagenet_2012_id.json"}
    lists = [path for path in (tmp_path / slug).rglob("*") if path.is_file() and path.suffix not in (".jpg", ".jpeg", ".JPEG", ".png", ".ppm") and path.name not in unread]
    for path in lists:
        whole = path.read_bytes()
        for content in (b"\xff\xfe\x00 no list", whole[:len(whole) * 2 // 3] + b"\xff"):
            path.write_bytes(content)
            wrong = []
            for split in ("train", "test"):
                try: tasks.open_task(slug, tmp_path, split)
                except ValueError as error: wrong.append(str(error))
            assert any(f"{slug} in {tmp_path / slug}: " in text for text in wrong), path
        path.write_bytes(whole)
    assert len(tasks.open_task(slug, tmp_path, "test"))


def test_labels_without_a_class(tmp_path):
    gtsrb(tmp_path)
    write(tmp_path / "GT-final_test.csv", "Filename;ClassId\n00000.ppm;43\n")
    with pytest.raises(ValueError, match="labels from 43 to 43, but 43 classes"): readers.read_gtsrb(tmp_path, "test")
