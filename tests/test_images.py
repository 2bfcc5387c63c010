"Hostile files, lists and folders; the order against a permutation; workers."
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from seer_nb.images import (BadImage, ImageFiles, LoaderFault, Rows, Samples, StatelessSampler, bad_image_report, decode_image, guarded, open_images, shuffled,
                            worker_memory)

RGB = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason(source, **options):
    with pytest.raises(BadImage) as caught: decode_image(source, **options)
    return caught.value.reason


def pixels(source): return decode_image(source).permute(1, 2, 0).numpy()


def jpeg_claiming(width, height):
    data = bytearray(encoded(Image.fromarray(RGB), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at:at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_claiming(width, height):
    "A valid PNG of one grey: the whole image compressed to a few kB per 100 Mpx row block."
    def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    packer, row = zlib.compressobj(9), bytes(width + 1)
    body = b"".join(packer.compress(row) for _ in range(min(height, 64))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# --- what must be refused ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [jpeg_claiming, png_claiming])
@pytest.mark.parametrize("size", [(60000, 60000), (20000, 20000), (12000, 9000), (65000, 2000)])
def test_bombs_are_refused_without_a_warning_and_never_decoded(make, size, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(make(*size)) == "too_large"


def test_bombs_take_no_memory(tmp_path):
    "In a process of its own: the peak grows by less than 50 MB, though the images claim 10.8 and 1.2 GB."
    (tmp_path / "a.jpg").write_bytes(jpeg_claiming(60000, 60000))
    (tmp_path / "b.png").write_bytes(png_claiming(20000, 20000))
    code = ("import resource, sys\nfrom seer_nb.images import open_images, BadImage\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nsource = open_images(sys.argv[1])\n"
            "for i in range(2):\n    try: source[i]\n    except BadImage as error: assert error.reason == 'too_large'\n    else: raise SystemExit('decoded')\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000   # KiB


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.5, 0.9])
def test_truncated_files_are_refused(format, part):
    whole = encoded(Image.fromarray(np.tile(RGB, (4, 4, 1))), format)
    assert reason(whole[:int(len(whole) * part)]) in ("truncated", "corrupt")


def test_other_reasons():
    assert reason(b"") == "empty"
    assert reason(b"\0" * 1000) == "unsupported"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "unsupported"
    assert reason(encoded(Image.fromarray(RGB), "TIFF")) == "unsupported"
    assert reason(encoded(Image.fromarray(RGB), "PNG"), max_pixels=24 * 40 - 1) == "too_large"
    assert decode_image(encoded(Image.fromarray(RGB), "PNG"), max_pixels=24 * 40).shape == (3, 24, 40)
    assert reason(encoded(Image.new("RGB", (7, 100)), "PNG")) == "too_small"
    assert reason(encoded(Image.new("RGB", (10, 501)), "PNG")) == "aspect"


def test_damage_never_raises_anything_but_BadImage():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        whole = encoded(Image.fromarray(RGB), format)
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 8): data[at] = rng.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try: image = decode_image(bytes(data))
                except BadImage as error: assert error.reason and "0x" not in str(error)
                else: assert image.shape[0] == 3 and image.dtype == torch.uint8


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")                    # opening it would wait for ever
    assert reason(tmp_path / "missing.jpg") == "missing"
    assert reason(tmp_path / "folder.jpg") == "unreadable"
    assert reason(tmp_path / "pipe.jpg") == "unreadable"
    (tmp_path / "file").write_bytes(b"x")
    assert reason(tmp_path / "file" / "a.jpg") == "unreadable"


def test_a_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    path.chmod(0)
    if os.access(path, os.R_OK):                        # root reads everything: let open() refuse instead
        def refuse(*args, **options): raise PermissionError(13, "Permission denied")
        monkeypatch.setattr("builtins.open", refuse)
    assert reason(path) == "unreadable"


def test_bad_image_survives_a_pipe_between_processes():
    import pickle
    error = pickle.loads(pickle.dumps(BadImage("corrupt", "no")))
    assert (error.reason, error.message, str(error)) == ("corrupt", "no", "corrupt: no")


def test_messages_hold_no_path(tmp_path):
    for name, content in {"a.jpg": b"no image", "b.png": b"\x89PNG\r\n\x1a\n" + b"x" * 99, "c.jpg": jpeg_claiming(9999, 9999)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage) as caught: decode_image(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)


# --- what must be read, and how ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_pixel_by_pixel(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(encoded(Image.fromarray(RGB), format, **options)), RGB)


def test_the_content_decides_not_the_name(tmp_path):
    for format in ("PNG", "BMP"):
        (tmp_path / "photo.jpg").write_bytes(encoded(Image.fromarray(RGB), format))
        assert np.array_equal(pixels(tmp_path / "photo.jpg"), RGB)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_that_png_knows(mode):
    image = Image.fromarray(RGB).convert(mode)
    assert np.array_equal(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_without_a_warning():
    palette = Image.fromarray(RGB).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transparency in (3, bytes(range(256))):
            assert np.array_equal(pixels(encoded(palette, "PNG", transparency=transparency)), np.asarray(palette.convert("RGB")))
    clear = np.dstack([RGB, np.zeros(RGB.shape[:2], np.uint8)])
    assert np.array_equal(pixels(encoded(Image.fromarray(clear, "RGBA"), "PNG")), RGB)


def test_cmyk_jpeg():
    smooth = Image.fromarray(np.tile(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (24, 1, 3)))
    out = pixels(encoded(smooth.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(out.astype(int) - np.asarray(smooth)).max() <= 3


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = np.linspace(0, 65535, 960).reshape(24, 40).astype(np.uint16)
    out = pixels(encoded(Image.fromarray(deep), "PNG"))
    assert np.abs(out - deep[..., None] / 257).max() <= 0.5


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((16, 16, 3), v, np.uint8)) for v in (10, 200)]
    for format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        assert (pixels(encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)) == 10).all()


# How the scene is found in the stored array, straight from the EXIF standard ("row 0 is ..., column 0 is ...").
UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 1)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    out = decode_image(data)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), UPRIGHT[orientation](stored))
    assert out.permute(1, 2, 0).is_contiguous()


def test_broken_exif_beside_good_pixels():
    data = encoded(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(data), RGB)


def test_memory_may_be_written_to():
    image = decode_image(encoded(Image.fromarray(RGB), "PNG"))
    image.zero_()
    assert image.sum() == 0


# --- sources ----------------------------------------------------------------------------------------------------------

def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(np.full((8, 8, 3), value, np.uint8)), "PNG"))


def test_a_folder_is_walked_in_one_order(tmp_path):
    names = ["Zebra.PNG", "a b/ü ñ 猫.png", "a b/z.JpEg", "a.webp", "ä/deep/er/x.bmp", "é.jpg"]
    for name in reversed(names): write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / ".cache").mkdir(); write(tmp_path / ".cache" / "x.png"); write(tmp_path / "a b" / "._z.jpg")
    (tmp_path / "ä" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    source = open_images(tmp_path)
    found = [source.name(i) for i in range(len(source))]
    assert found == sorted(names, key=os.fsencode)
    assert all(source[i].shape == (3, 8, 8) for i in range(len(source)))
    assert open_images(str(tmp_path)).name(2) == found[2]


def test_names_that_are_not_utf8(tmp_path):
    try: (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    except OSError: pytest.skip("this file system only takes UTF-8")
    write(tmp_path / os.fsdecode(b"caf\xe9.png"))
    source = open_images(tmp_path)
    assert source[0].shape == (3, 8, 8)
    (tmp_path / "caf\udce9.png").write_bytes(b"broken")
    with pytest.raises(RuntimeError): Samples(source, bad_images=tmp_path / "bad.jsonl", max_attempts=1)[0, 0]
    assert bad_image_report(tmp_path / "bad.jsonl") == {"unsupported": 1}


@pytest.mark.parametrize("kind", ["text", "crlf", "bom", "unicode", "bytes"])
def test_lists(tmp_path, kind):
    write(tmp_path / "data" / "ü 1.png", 7); write(tmp_path / "abs.png", 9)
    names = ["ü 1.png", "gone.png", str(tmp_path / "abs.png")]
    path = tmp_path / "data" / ("list.npy" if kind in ("unicode", "bytes") else "list.txt")
    if kind == "unicode": np.save(path, np.array(names))
    elif kind == "bytes": np.save(path, np.array([n.encode() for n in names]))
    else: path.write_bytes((b"\xef\xbb\xbf" if kind == "bom" else b"") + ("\r\n" if kind == "crlf" else "\n").join(names).encode())
    source = open_images(path)
    assert len(source) == 3 and source.name(0) == "ü 1.png"
    assert source[0].unique().item() == 7 and source[2].unique().item() == 9
    with pytest.raises(BadImage, match="missing"): source[1]


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir(); (tmp_path / "empty.txt").touch(); write(tmp_path / "one.png")
    (tmp_path / "data.bin").write_bytes(bytes(99))
    np.save(tmp_path / "objects.npy", np.array(["a", 1], object)); np.save(tmp_path / "numbers.npy", np.zeros(3))
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(FileNotFoundError): open_images(tmp_path / "gone")
    with pytest.raises(FileNotFoundError): open_images("")
    for name, words in {"empty": ".webp", "empty.txt": "empty list", "one.png": "single image", "data.bin": "text list",
                        "objects.npy": "pickle", "numbers.npy": "row of text"}.items():
        with pytest.raises(ValueError, match=words): open_images(tmp_path / name)
    for spec in ("s3://a/b", "http://a/b", "toyworld:", "toyworld:0", "toyworld:x", "toyworld:-3"):
        with pytest.raises((ValueError, ImportError)): open_images(spec)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_no_pickle_is_run(tmp_path):
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "ran"),))
    np.save(tmp_path / "evil.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(ValueError): open_images(tmp_path / "evil.npy")
    assert not (tmp_path / "ran").exists()


def test_many_names_take_little_memory():
    source = ImageFiles("", (f"folder/{i:09}" for i in range(200_000)))
    assert source.name(199_999) == "folder/000199999" and source.name(65_536) == "folder/000065536"
    assert len(source._blob) + source._offsets.nbytes == 200_000 * 16 + 200_001 * 8
    for bad in (-1, 200_000):
        with pytest.raises(IndexError): source.name(bad)


def test_a_npy_list_stays_on_disk(tmp_path):
    names = [f"ordner/bild {i:07}.png" for i in range(30_000)]
    for kind, array in (("U", np.array(names)), ("S", np.array(names, "S"))):
        np.save(tmp_path / "list.npy", array)
        source = open_images(tmp_path / "list.npy")
        assert len(source) == 30_000 and [source.name(i) for i in (0, 29_999, 777)] == [names[0], names[-1], names[777]]
        copy = pickle.loads(pickle.dumps(source))                 # a worker that is not forked gets the path
        assert copy.name(5) == names[5] and len(pickle.dumps(source)) < 2000
        with open(tmp_path / "list.npy", "r+b") as file: file.truncate(500)
        assert source.name(0) == names[0]
        with pytest.raises(OSError, match="shorter"): source.name(29_999)


def test_rows_are_of_plain_types_only(tmp_path):
    np.save(tmp_path / "table.npy", np.zeros((3, 4)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "table.npy").read_bytes()[:40])
    np.savez(tmp_path / "zip.npy", a=np.zeros(3)); os.rename(tmp_path / "zip.npy.npz", tmp_path / "zip.npy")
    np.save(tmp_path / "none.npy", np.zeros(0, "S5"))
    for name in ("table", "cut", "zip"):
        with pytest.raises((ValueError, EOFError)): Rows(tmp_path / f"{name}.npy")
    with pytest.raises(ValueError, match="empty list"): open_images(tmp_path / "none.npy")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the kernel does not tell")
def test_names_do_not_grow_with_workers(tmp_path):
    n = 400_000
    np.lib.format.open_memmap(tmp_path / "many.npy", "w+", "S20", (n,))[:] = np.char.zfill(np.arange(n).astype("S7"), 20)
    (tmp_path / "many.txt").write_bytes(b"\n".join(np.load(tmp_path / "many.npy")))
    for kind in ("npy", "txt"):
        assert max(worker_memory(open_images(tmp_path / f"many.{kind}"), workers, reads=20_000) for workers in (1, 2)) < 4   # MB; a list of str: 40


# --- the order --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 12, 97, 1000, 2**10 - 1, 2**10, 2**10 + 1, 2**16 - 1, 2**16 + 1, 99_991])
def test_shuffled_is_one_to_one(n):
    for seed, epoch in ((0, 0), (0, 1), (2**63, 7)):
        order = shuffled(np.arange(n), n, seed, epoch)
        assert np.array_equal(np.sort(order), np.arange(n))
        part = np.arange(n)[::7]
        assert np.array_equal(shuffled(part, n, seed, epoch), order[::7])


@pytest.mark.parametrize("n", [10**9, 10**12 + 39, 2**53 + 1, 2**62])
def test_shuffled_beyond_memory(n):
    positions = np.concatenate([np.arange(5000), n - 1 - np.arange(5000)])
    order = shuffled(positions, n)
    assert len(np.unique(order)) == 10_000 and order.min() >= 0 and order.max() < n
    assert abs(order.mean() / n - 0.5) < 0.02
    assert (shuffled(positions, n, epoch=1) != order).mean() > 0.99
    assert (shuffled(positions, n, seed=1) != order).mean() > 0.99


@pytest.mark.parametrize("n", [3, 4, 12, 20])
def test_every_image_comes_to_every_position_equally_often(n):
    stats = pytest.importorskip("scipy.stats")
    seeds, counts = 3000, np.zeros((n, n))
    for seed in range(seeds): counts[np.arange(n), shuffled(np.arange(n), n, seed)] += 1
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    assert stats.chi2.sf(chi2, (n - 1) ** 2) > 1e-3


def test_shuffled_refuses_what_it_cannot_do():
    for args in (([0], 0), ([5], 5), ([-1], 5), ([0], 2**62 + 1)):
        with pytest.raises(ValueError): shuffled(*args)
    with pytest.raises(ValueError): shuffled([0], 5, rounds=3)


def take(sampler, count): return [pair for pair, _ in zip(sampler, range(count))]


@pytest.mark.parametrize("n, world", [(1, 1), (1, 3), (2, 3), (10, 3), (97, 4), (1000, 7)])
def test_every_image_once_per_epoch_over_all_ranks(n, world):
    epochs = 4
    each = -(-n * epochs // world)
    pairs = [pair for r in range(world) for pair in take(StatelessSampler(n, r, world, seed=5, block=16), each)]
    for epoch in range(epochs):
        assert sorted(i for i, e in pairs if e == epoch) == list(range(n))
    if n > 50:
        first = [[i for i, e in take(StatelessSampler(n, seed=5), 2 * n) if e == epoch] for epoch in (0, 1)]
        assert first[0] != first[1]


@pytest.mark.parametrize("start", [0, 1, 15, 16, 17, 1000, 1023, 1024, 1025])
def test_resume_is_a_start_index(start):
    whole = take(StatelessSampler(333, 1, 3, seed=1), 1100 + 50)
    assert take(StatelessSampler(333, 1, 3, seed=1, start=start), 50) == whole[start:start + 50]
    assert take(StatelessSampler(333, 1, 3, seed=1, start=start, block=7), 50) == whole[start:start + 50]


def test_sampler_without_shuffling_and_bad_arguments():
    assert take(StatelessSampler(3, shuffle=False), 4) == [(0, 0), (1, 0), (2, 0), (0, 1)]
    for options in (dict(n=0), dict(n=3, rank=2, world_size=2), dict(n=3, rank=-1), dict(n=3, start=-1), dict(n=3, world_size=0)):
        with pytest.raises(ValueError): StatelessSampler(**options)


# --- samples ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def half_bad(tmp_path):
    for k in range(10): write(tmp_path / "images" / f"{k}.png", k)
    for k in range(0, 10, 2): (tmp_path / "images" / f"{k}.png").write_bytes(b"" if k < 6 else b"<html>")
    return tmp_path


def value(image, seed, index, epoch): return image[0, 0, 0].long() * 10**6 + index * 1000 + epoch


def test_replacement_is_a_function_of_seed_index_and_epoch(half_bad):
    source = open_images(half_bad / "images")
    keys = [(i, e) for e in range(3) for i in range(10)]
    forward = {k: Samples(source, value, seed=3)[k].item() for k in keys}
    samples = Samples(source, value, seed=3)
    assert {k: samples[k].item() for k in reversed(keys)} == {k: forward[k] for k in keys}
    assert all(forward[i, e] == i * 10**6 + i * 1000 + e for i, e in keys if i % 2)
    assert len({forward[0, e] // 10**6 for e in range(3)} | {forward[2, e] // 10**6 for e in range(3)}) > 1
    assert any(Samples(source, value, seed=4)[k].item() != forward[k] for k in keys)


def test_report_is_written_once_per_process_and_counted_by_name(half_bad):
    samples = Samples(open_images(half_bad / "images"), value, bad_images=half_bad / "run" / "bad.jsonl")
    for epoch in range(5):
        for i in range(10): samples[i, epoch]
    rows = [json.loads(line) for line in (half_bad / "run" / "bad.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(set(row) == {"name", "reason", "error"} for row in rows)
    assert bad_image_report(half_bad / "run" / "bad.jsonl") == {"empty": 3, "unsupported": 2}
    with open(half_bad / "run" / "bad.jsonl", "a") as file: file.write('{"name": "torn')
    assert bad_image_report(half_bad / "run" / "bad.jsonl") == {"empty": 3, "unsupported": 2}


def test_workers_give_the_same_stream_and_one_report(half_bad):
    source, batches = open_images(half_bad / "images"), {}
    for workers in (0, 2):
        path = half_bad / f"bad{workers}.jsonl"
        loader = DataLoader(Samples(source, value, seed=1, bad_images=path), sampler=StatelessSampler(10, seed=1), batch_size=4, num_workers=workers)
        batches[workers] = [batch.tolist() for batch, _ in zip(loader, range(10))]
        assert bad_image_report(path) == {"empty": 3, "unsupported": 2}
    assert batches[0] == batches[2]


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no"); (tmp_path / "b.png").touch()
    with pytest.raises(RuntimeError, match="100 images in a row"): Samples(open_images(tmp_path))[0, 0]
    with pytest.raises(ZeroDivisionError):                # an error of the transform is not an error of the image
        write(tmp_path / "a.png")
        Samples(open_images(tmp_path), lambda *_: 1 / 0)[0, 0]


def test_above_a_share_of_bad_images_the_run_stops(half_bad):
    samples = Samples(open_images(half_bad / "images"), value, seed=1)
    with pytest.raises(RuntimeError, match="more than max_bad = 5%.*empty.*unsupported"):
        for epoch in range(100):
            for i in range(10): samples[i, epoch]
    patient = Samples(open_images(half_bad / "images"), value, seed=1, max_bad=1)
    for epoch in range(100):
        for i in range(10): patient[i, epoch]
    assert patient._bad.total() > 500 and patient._bad["empty"] > patient._bad["unsupported"]


# --- workers that die or hang ------------------------------------------------------------------------------------------

class Scene:
    "Images whose reading does something else once, in a worker: `scene` is called with the number of the image."
    def __init__(self, scene): self.scene = scene
    def __len__(self): return 100
    def name(self, i): return f"folder/{i}.jpg"
    def __getitem__(self, i):
        self.scene(i)
        return torch.full((3, 8, 8), i, dtype=torch.uint8)


def play(scene, timeout=60, workers=2, **options):
    loader = DataLoader(Samples(Scene(scene), **options), sampler=StatelessSampler(100, shuffle=False), batch_size=5, num_workers=workers, timeout=timeout)
    seen = []
    with guarded(loader) as batches:
        play.seen, play.workers = seen, batches.workers
        for batch, _ in zip(batches, range(40)): seen.append(batch[:, 0, 0, 0].tolist())
    return seen


def gone(workers): return all(worker.exitcode is not None for worker in workers)


def test_a_worker_killed_while_it_reads_is_named_with_its_image():
    with pytest.raises(LoaderFault, match=r"worker \d \(process \d+\), at image 42, 'folder/42.jpg', ended with SIGKILL.*memory.*checkpoint"):
        play(lambda i: i == 42 and os.kill(os.getpid(), signal.SIGKILL))
    assert play.seen[:2] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and gone(play.workers)


def test_a_worker_killed_while_the_main_process_computes():
    "PyTorch's alarm goes off in the midst of other code."
    loader = DataLoader(Samples(Scene(lambda i: None)), sampler=StatelessSampler(100), batch_size=5, num_workers=2, timeout=60)
    with pytest.raises(LoaderFault, match="worker 1 .* ended with SIGKILL"):
        with guarded(loader) as batches:
            next(batches)
            os.kill(batches.workers[1].pid, signal.SIGKILL)
            for _ in range(1000): torch.ones(99).sum(); time.sleep(0.01)
    assert gone(batches.workers)


def test_a_worker_that_exits():
    with pytest.raises(LoaderFault, match="at image 17, .* ended with exit code 3"): play(lambda i: i == 17 and os._exit(3))


@pytest.mark.parametrize("stuck", [lambda: time.sleep(600), lambda: os.kill(os.getpid(), signal.SIGSTOP)])
def test_a_stuck_or_stopped_worker_is_named_and_ended(stuck):
    with pytest.raises(LoaderFault, match=r"worker 0 \(process \d+\), at image 21, 'folder/21.jpg', has not answered for 3 s"):
        play(lambda i: i == 21 and stuck(), timeout=3)
    assert gone(play.workers) and "worker 1" not in str(play.seen)


def test_other_errors_pass_through_and_workers_end():
    with pytest.raises(ZeroDivisionError): play(lambda i: 1 / (i - 30))
    assert gone(play.workers)
    with pytest.raises(RuntimeError, match="mine") as caught:
        with guarded(DataLoader(Samples(Scene(lambda i: None)), sampler=StatelessSampler(100), num_workers=1)) as batches:
            next(batches)
            raise RuntimeError("mine")
    assert not isinstance(caught.value, LoaderFault) and gone(batches.workers)
    assert play(lambda i: None, timeout=0, workers=0)[:2] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert len(play(lambda i: None)) == 40 and gone(play.workers)


def test_a_fault_does_not_keep_the_process_from_ending(tmp_path):
    code = ("import os, signal\nfrom torch.utils.data import DataLoader\nfrom seer_nb.images import *\n"
            "class Stop:\n    def __len__(self): return 9\n    def name(self, i): return str(i)\n"
            "    def __getitem__(self, i): os.kill(os.getpid(), signal.SIGSTOP)\n"
            "with guarded(DataLoader(Samples(Stop()), sampler=StatelessSampler(9), num_workers=2, timeout=1)) as batches: next(batches)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("seer_nb.images.LoaderFault: worker 0")
