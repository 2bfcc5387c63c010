"Tar shards: indexes, hostile archives, remote stores, the order, faults in the middle of a run."
import http.server
import io
import json
import os
import pickle
import re
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from seer_nb import shards
from seer_nb.images import BadImage, LoaderFault, Samples, StatelessSampler, bad_image_report, guarded, open_images, shuffled
from seer_nb.shards import ShardSampler, TarShards, expand_shards, index_shard, open_shards, sampler_for, shard_order


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEER_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def packed(members, **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def make(folder, counts=(5, 3, 7, 4), start=0):
    "Shards whose images have the values 0, 1, 2, …"
    folder.mkdir(parents=True, exist_ok=True)
    for k, count in enumerate(counts):
        (folder / f"shard-{k:03}.tar").write_bytes(packed([(f"{i:04}.{kind}", png(i) if kind == "png" else b"text")
                                                           for i in range(start, start + count) for kind in ("png", "txt")]))
        start += count
    return f"{folder}/shard-{{000..{len(counts) - 1:03}}}.tar"


def value(image): return int(image[0, 0, 0])


def values(source): return [value(source[i]) for i in range(len(source))]


def take(sampler, count): return [pair for pair, _ in zip(sampler, range(count))]


# --- the index --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_and_long_names(format):
    names = ["a.png", "d/" * 40 + "b.JPG", "ü 猫.webp"] + ([] if format == tarfile.USTAR_FORMAT else ["x" * 300 + ".png"])
    data = packed([(name, png(k)) for k, name in enumerate(names)], format=format)
    rows = index_shard(io.BytesIO(data))
    assert [data[o:o + s] for o, s, _ in rows.tolist()] == [png(k) for k in range(len(names))]
    assert [r["name"].decode() for r in rows][:3] == [names[0], names[1].replace("//", "/"), names[2]] and all(len(r["name"].decode()) <= 160 for r in rows)


def test_what_is_no_image_is_passed_over():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo("x.png"); entry.type, entry.linkname = kind, "/etc/passwd"; tar.addfile(entry)
        for name in ("a.txt", "._a.png", "d/.hidden.jpg", "a.png.cls", "real.png"):
            entry = tarfile.TarInfo(name); entry.size = 4; tar.addfile(entry, io.BytesIO(b"1234"))
    assert index_shard(io.BytesIO(file.getvalue()))["name"].tolist() == [b"real.png"]


def test_names_are_harmless_labels(tmp_path):
    evil = ["../../../etc/passwd.png", "/abs/x.png", "a/../../b.png", "..\\..\\w.png", "C:\\x.png", "\x1b[2J\n.png", "n\0ull.png", "\u202egnp.exe.png"]
    (tmp_path / "x.tar").write_bytes(packed([(name, png(1)) for name in evil]))
    before = sorted(os.listdir(tmp_path))
    source = open_shards(str(tmp_path / "x.tar"), cache=tmp_path / "elsewhere")
    for i in range(len(source)):
        name = source.name(i)
        assert name.startswith("x.tar/") and name.isprintable() and "\\" not in name and ".." not in name.split("/") and value(source[i]) == 1
    assert sorted(set(os.listdir(tmp_path)) - set(before)) == ["elsewhere"]


@pytest.mark.parametrize("cut", [0.1, 0.35, 0.5, 0.77, 0.9])
def test_a_cut_archive_keeps_its_beginning(tmp_path, cut):
    data = packed([(f"{k}.png", png(k)) for k in range(10)])
    data = data[:10 * 1024]                                  # without the zeros at the end
    (tmp_path / "x.tar").write_bytes(data[:int(len(data) * cut)])
    source = open_shards(str(tmp_path / "x.tar"))
    whole = sum(1024 * k + 512 + len(png(k)) <= int(len(data) * cut) for k in range(10))
    assert [value(source[i]) for i in range(len(source) - 1)] == list(range(whole))
    with pytest.raises(BadImage, match="truncated"): source[len(source) - 1]
    assert source.name(len(source) - 1) == "x.tar/?"


def test_damage_never_hangs_and_never_raises_anything_but_BadImage(tmp_path):
    rng, data = np.random.default_rng(0), packed([(f"{k}.png", png(k)) for k in range(6)], format=tarfile.PAX_FORMAT)
    heads = [at for at in range(0, len(data), 512) if data[at + 257:at + 262] == b"ustar"]
    for trial in range(150):
        hurt = bytearray(data)
        for _ in range(3):
            at = int(rng.choice(heads)) + int(rng.integers(0, 512))
            hurt[at] = rng.integers(256)
        for head in heads if trial % 2 else []:              # with a right checksum the damage is believed
            hurt[head + 148:head + 156] = b" " * 8
            hurt[head + 148:head + 156] = b"%06o\0 " % sum(hurt[head:head + 512])
        path = tmp_path / f"{trial}.tar"
        path.write_bytes(hurt)
        try: source = open_shards(str(path))
        except FileNotFoundError: continue
        for i in range(len(source)):
            try: source[i]
            except BadImage: pass


def header(name, size, kind=b"0"):
    block = bytearray(512)
    block[:len(name)], block[100:108], block[156:157], block[257:265] = name, b"0000644\0", kind, b"ustar\00000"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("trap", [
    header(b"a.png", b"\xff" * 12),                                  # size -1: sends tarfile of some versions round for ever
    header(b"a.png", b"\xff" * 10 + b"\xfc\x00"),                    # back to the start
    header(b"a.png", b"\x80" + b"\x7f" * 11),                        # 10**26 bytes
    header(b"x", 2**33 - 1, b"x"), header(b"L", 2**33 - 1, b"L"),    # a header of 8 GB
    header(b"x", 2048, b"x") + b"9" * 2048])
def test_traps_in_headers(tmp_path, trap):
    good = packed([("ok.png", png(3))])[:1024 - 512 + 512]
    (tmp_path / "x.tar").write_bytes(good + trap + bytes(4096))
    source = open_shards(str(tmp_path / "x.tar"))
    assert value(source[0]) == 3 and len(source) == 2
    with pytest.raises(BadImage): source[1]


def test_limits_hold_before_anything_is_read(tmp_path):
    (tmp_path / "x.tar").write_bytes(packed([("big.png", bytes(3 * 2**20)), ("none.png", b""), ("page.png", b"<html>"), ("ok.png", png(9))]))
    source = open_shards(str(tmp_path / "x.tar"), max_pixels=1000)
    reasons = []
    for i in range(3):
        with pytest.raises(BadImage) as caught: source[i]
        reasons.append(caught.value.reason)
    assert reasons == ["too_large", "empty", "unsupported"] and value(source[3]) == 9


# --- the index in its file --------------------------------------------------------------------------------------------

def kept(cache): return sorted((cache / "indexes").glob("*.npy"))


def test_the_index_is_built_once_and_again_when_the_shard_changes(tmp_path, cache, monkeypatch):
    spec, built = make(tmp_path / "data"), []
    real = shards.index_shard
    monkeypatch.setattr(shards, "index_shard", lambda file: (built.append(1), real(file))[1])
    assert values(open_shards(spec)) == list(range(19)) and len(built) == 4
    assert values(open_shards(spec)) == list(range(19)) and len(built) == 4 and len(kept(cache)) == 4
    make(tmp_path / "data", (5, 3, 8, 4))                             # every mark changes, one size
    assert values(open_shards(spec)) == list(range(20)) and len(built) == 8
    assert not [file for file in (cache / "indexes").iterdir() if file.suffix != ".npy"]


def test_an_index_beside_the_shard_is_used_if_it_fits(tmp_path, cache, monkeypatch):
    make(tmp_path / "data")
    shard = tmp_path / "data" / "shard-000.tar"
    open_shards(str(shard))
    index, = kept(cache)
    index.rename(f"{shard}.index.npy")
    monkeypatch.setattr(shards, "index_shard", lambda file: pytest.fail("it was built"))
    os.utime(shard, (5, 5))                                           # a copy has another time
    assert values(open_shards(str(shard))) == list(range(5)) and not kept(cache)
    monkeypatch.undo()
    monkeypatch.setenv("SEER_NB_CACHE", str(cache))
    shard.write_bytes(shard.read_bytes() + bytes(512))                # another size: another shard
    assert values(open_shards(str(shard))) == list(range(5)) and len(kept(cache)) == 1


def hostile_indexes(tmp_path):
    good = np.array([(10240, 1, b"m" * 16), (512, 80, b"a.png")], [("offset", "<i8"), ("size", "<i8"), ("name", "S16")])
    def saved(array, **options):
        file = io.BytesIO(); np.save(file, array, **options); return file.getvalue()
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    many = saved(good).replace(b"(2,)", b"(9,)")                      # promises more rows than there are
    return {"pickle": pickle.dumps(Bomb()), "objects": saved(np.array([Bomb()], object), allow_pickle=True), "numbers": saved(np.zeros(9)),
            "table": saved(good.reshape(1, 2)), "types": saved(good.astype([("offset", "<f8"), ("size", "<i8"), ("name", "S16")])),
            "wide": saved(good.astype([("offset", "<i8"), ("size", "<i8"), ("name", "S4000")])), "one row": saved(good[:1]), "cut": saved(good)[:-5],
            "many": many, "count": saved(np.concatenate([good, good])), "zip": b"PK\3\4" + bytes(99), "json": b'{"offset": 0}', "empty": b""}


def test_a_hostile_index_is_built_anew(tmp_path, cache):
    spec = make(tmp_path / "data", (5,))
    open_shards(spec)
    for name, content in hostile_indexes(tmp_path).items():
        kept(cache)[0].write_bytes(content)
        assert values(open_shards(spec)) == list(range(5)), name
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("offset, size", [(-512, 100), (2**62, 100), (0, 2**40), (10**9, 80), (512, -7), (512, 0)])
def test_rows_that_lie_are_bad_images(tmp_path, cache, offset, size):
    spec = make(tmp_path / "data", (2,))
    open_shards(spec)
    rows = np.load(kept(cache)[0])
    rows[2]["offset"], rows[2]["size"], rows[2]["name"] = offset, size, b"../\x1b[31m"
    np.save(kept(cache)[0], rows)
    source = open_shards(spec)
    with pytest.raises(BadImage): source[1]
    assert source.name(1).isprintable() and value(source[0]) == 0


def test_without_a_place_for_indexes_they_stay_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    source = open_shards(make(tmp_path / "data"), cache=tmp_path / "file" / "no")
    assert values(source) == list(range(19)) and values(pickle.loads(pickle.dumps(source))) == list(range(19))


def test_an_index_that_vanishes_or_shrinks_while_it_is_used(tmp_path, cache):
    source = open_shards(make(tmp_path / "data"))
    assert value(source[0]) == 0
    for file in kept(cache): os.truncate(file, 200)
    with pytest.raises(BadImage, match="index"): source[1]            # it is open, and shorter
    assert value(source[8]) == 8                                      # of another shard: built anew
    assert pickle.loads(pickle.dumps(source))[1] is not None


def test_an_index_that_cannot_be_read_back_stays_in_memory(tmp_path, cache, monkeypatch):
    def refuse(path): raise SystemError("AST constructor recursion depth mismatch")      # Python 3.11.0 to 3.11.7, in threads: CPython issue 106905
    monkeypatch.setattr(shards, "Rows", type("Rows", (), {"__init__": lambda self, path: refuse(path)}))
    source = open_shards(make(tmp_path / "data"))
    assert values(source) == list(range(19)) and values(pickle.loads(pickle.dumps(source))) == list(range(19))


# --- patterns ---------------------------------------------------------------------------------------------------------

def test_patterns(tmp_path, monkeypatch):
    make(tmp_path / "d", (1,) * 12)
    assert [p[-7:] for p in expand_shards(f"{tmp_path}/d/shard-{{008..011}}.tar")] == ["008.tar", "009.tar", "010.tar", "011.tar"]
    assert expand_shards("{1..2}/{08..10}.tar") == ["1/08.tar", "1/09.tar", "1/10.tar", "2/08.tar", "2/09.tar", "2/10.tar"]
    assert len(expand_shards(f"{tmp_path}/d/shard-00*.tar")) == 10 and expand_shards(f"{tmp_path}/?/shard-000.tar") == [f"{tmp_path}/d/shard-000.tar"]
    (tmp_path / "[x].tar").write_bytes(packed([("a.png", png(1))]))
    assert expand_shards(f"{tmp_path}/[x].tar") == [f"{tmp_path}/[x].tar"]
    monkeypatch.chdir(tmp_path / "d")
    assert len(open_images("shard-*.tar")) == 12 and len(open_images("shard-000.tar")) == 1


@pytest.mark.parametrize("spec", ["pipe:touch ran; cat x.tar", "pipe://touch ran; cat x.tar", "file:///x.tar", "memory://x.tar", "ftp://h/x.tar", "S3://b/x.tar",
                                  "filecache::s3://b/x.tar", "s3://b/x.tar::file:///etc/passwd.tar", "s3://b/{0..99999999}.tar", "{0..9999}{0..9999}.tar",
                                  "{9..3}.tar", "http://h/*.tar", "x.tar.gz", "x.tgz", "s3://b/folder"])
def test_what_is_no_shard_is_refused_at_once(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "_filesystem", lambda url: pytest.fail("it was asked for"))
    with pytest.raises((ValueError, FileNotFoundError)): open_images(spec)
    assert not (tmp_path / "ran").exists()


def test_a_missing_package_is_named(monkeypatch):
    import fsspec.core
    def missing(url, **options): raise ImportError("Install s3fs to access S3")
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ImportError, match="pip install s3fs"): open_images("s3://bucket/shard-{000..003}.tar")


def test_local_shards_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    assert values(open_images(make(tmp_path / "data"))) == list(range(19))


# --- far away ---------------------------------------------------------------------------------------------------------

class Server(http.server.BaseHTTPRequestHandler):
    "A web server with Range requests and entity tags; `log` has (method, path, range)."
    protocol_version = "HTTP/1.1"

    def do_HEAD(self): self.answer(False)

    def do_GET(self): self.answer(True)

    def answer(self, body):
        path, server = self.path.partition("?")[0].lstrip("/"), self.server
        server.log.append((self.command, path, self.headers.get("Range")))
        data, status = server.files.get(path), 200
        if server.failures: server.failures -= 1; data = None; status = 503
        if data is None:
            self.send_response(404 if status == 200 else status); self.send_header("Content-Length", "0"); self.end_headers(); return
        whole = data
        if (span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))) and server.ranges:
            status, data = 206, data[int(span[1]):int(span[2]) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(whole)}"')
        if status == 206: self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{len(whole)}")
        self.end_headers()
        if body: self.wfile.write(data)

    def log_message(self, *args): pass


@pytest.fixture
def web(tmp_path):
    pytest.importorskip("aiohttp")                                    # comes with lightly
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.log, server.files, server.failures, server.ranges = [], {}, 0, True
    server.handle_error = lambda *_: None                             # a client that hangs up is no news
    make(tmp_path / "web")
    for file in (tmp_path / "web").iterdir(): server.files[file.name] = file.read_bytes()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.spec = server.url + "/shard-{000..003}.tar"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def gets(server): return [entry for entry in server.log if entry[0] == "GET" and entry[2]]


def test_an_image_on_a_web_server_is_one_request_of_its_bytes(web):
    source = open_shards(web.spec, cache_gib=0)
    assert source.shards.tolist() == [5, 3, 7, 4] and source.name(6) == "shard-001.tar/0006.png"
    web.log.clear()
    assert value(source[6]) == 6 and value(source[7]) == 7
    first, last = map(int, gets(web)[0][2].removeprefix("bytes=").split("-"))
    assert last - first + 1 == len(png(6)) and len(gets(web)) == 2
    again = open_shards(web.spec, cache_gib=0)                        # the indexes are kept
    web.log.clear()
    assert values(again) == list(range(19)) and len(gets(web)) == 19


def test_a_shard_in_use_is_copied_once_and_read_from_the_copy(web, cache):
    source = open_shards(web.spec)
    assert value(source[8]) == 8
    source._copier.join()
    copy, = (cache / "shards").iterdir()
    assert copy.read_bytes() == web.files["shard-002.tar"]
    web.log.clear()
    assert [value(source[i]) for i in range(8, 15)] == list(range(8, 15)) and not web.log
    web.files["shard-002.tar"] = packed([(f"new{i}.png", png(100 + i)) for i in range(7)])     # another tag: the copy is stale
    assert [value(open_shards(web.spec)[i]) for i in (8, 14)] == [100, 106]


def test_the_room_for_copies_is_limited_and_copies_in_use_are_not_thrown_out(web, cache):
    room = sum(len(web.files[f"shard-00{k}.tar"]) for k in (0, 1))
    source = open_shards(web.spec, cache_gib=room / 2**30)
    def copied(i):
        source._pause = 0
        source[i]
        source._copier.join()
        source._copier = None
        return len(list((cache / "shards").iterdir()))
    assert [copied(0), copied(5), copied(8), copied(15)] == [1, 2, 2, 2]
    for file in (cache / "shards").iterdir(): os.utime(file, (1, 1))  # not used for a long time
    (cache / "shards" / "dead.part").touch(); os.utime(cache / "shards" / "dead.part", (1, 1))
    old = {file.name for file in (cache / "shards").iterdir()}
    copied(8)                                                          # of 20 KB, in the place of one or two others
    new = {file.name: file.stat().st_size for file in (cache / "shards").iterdir()}
    assert len(set(new) - old) == 1 and "dead.part" not in new and sum(new.values()) <= room


def test_an_index_published_beside_a_remote_shard_saves_reading_it(web, tmp_path, cache):
    for name in list(web.files):
        rows = index_shard(io.BytesIO(web.files[name]))
        head = np.array([(len(web.files[name]), len(rows), b"")], rows.dtype)
        file = io.BytesIO(); np.save(file, np.concatenate([head, rows]))
        web.files[f"{name}.index.npy"] = file.getvalue()
    source = open_shards(web.spec, cache_gib=0)
    assert not [entry for entry in web.log if entry[0] == "GET" and entry[1].endswith(".tar") and entry[2]] and values(source) == list(range(19))


def test_short_troubles_of_a_server_are_sat_out_and_long_ones_reported(web, monkeypatch):
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    source = open_shards(web.spec + "?key=SECRET", cache_gib=0)
    web.failures = 2
    assert value(source[0]) == 0
    web.failures = 99
    with pytest.raises(BadImage, match="503") as caught: source[1]
    assert caught.value.reason == "shard" and "SECRET" not in str(caught.value) + source.name(1)
    web.failures = 0
    del web.files["shard-001.tar"]
    with pytest.raises(BadImage, match="no such file"): source[6]
    web.ranges = False
    with pytest.raises(BadImage, match="more than"): source[0]


def test_workers_read_from_a_web_server_that_the_main_process_has_used(web):
    source = open_shards(web.spec, cache_gib=0)
    assert value(source[0]) == 0                                      # fsspec's thread runs in this process now
    loader = DataLoader(Samples(source), sampler=sampler_for(source, lanes=2), batch_size=4, num_workers=2, timeout=60)
    with guarded(loader) as batches: seen = torch.cat([next(batches)[:, 0, 0, 0] for _ in range(4)]).tolist()
    assert seen == [i for i, _ in take(sampler_for(source, lanes=2), 16)]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    "fsspec's file system in memory stands in for S3."
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem
    class Bucket(MemoryFileSystem):
        protocol, store, pseudo_dirs = "s3", {}, [""]
        @classmethod
        def _strip_protocol(cls, path): return "/" + path.removeprefix("s3://").strip("/")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    make(tmp_path / "b")
    for file in (tmp_path / "b").iterdir(): Bucket().pipe_file(f"/bucket/train/{file.name}", file.read_bytes())
    yield Bucket()
    from fsspec.registry import _registry
    _registry.pop("s3")


def test_s3(bucket, cache):
    assert expand_shards("s3://bucket/train/shard-*.tar")[1] == "s3://bucket/train/shard-001.tar"
    for spec in ("s3://bucket/train/shard-*.tar", "s3://bucket/train/shard-{000..003}.tar"):
        source = open_images(spec)
        assert values(source) == list(range(19)) and source.name(0) == "shard-000.tar/0000.png"
    if source._copier: source._copier.join()
    with pytest.raises(FileNotFoundError): open_images("s3://bucket/none/shard-*.tar")
    with pytest.raises(FileNotFoundError): open_images("s3://bucket/none/shard-000.tar")


# --- the order --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [[1], [7], [1, 1], [5, 0, 0, 9], [0, 3, 0], list(range(40)), [1000, 1, 1000]])
@pytest.mark.parametrize("lanes", [1, 2, 3, 16, 500, 5000])
def test_the_order_is_one_to_one_and_has_no_memory(sizes, lanes):
    n = sum(sizes)
    for seed, epoch in ((0, 0), (0, 1), (2**63, 7)):
        order = shard_order(np.arange(n), sizes, seed, epoch, lanes)
        assert sorted(order) == list(range(n))
        assert np.array_equal(shard_order(np.arange(n)[::-3], sizes, seed, epoch, lanes), order[::-3])
    if n > 100: assert any((shard_order(np.arange(n), sizes, 0, 1, lanes) != order))


def test_a_billion_images_in_shards_of_any_size():
    sizes = np.random.default_rng(0).integers(1, 20_000, 100_000)
    positions = np.concatenate([np.arange(3000), sizes.sum() - 1 - np.arange(3000)])
    order = shard_order(positions, sizes, lanes=256)
    assert len(np.unique(order)) == 6000 and 0 <= order.min() and order.max() < sizes.sum()


@pytest.mark.parametrize("lanes", [1, 4, 32])
def test_few_shards_are_in_use_and_a_batch_mixes_them(lanes):
    order = shard_order(np.arange(100 * 64), np.full(100, 64), 3, 0, lanes) // 64
    for start in range(0, 6400 - 64 * lanes // 2, 640):
        assert len(set(order[start:start + 32 * lanes])) <= 2 * lanes + 1
    assert np.mean([len(set(order[start:start + 32])) for start in range(0, 6400, 32)]) >= min(lanes, 32) * 0.8


def test_shards_of_an_order_are_shuffled_unlike_each_other():
    order = shard_order(np.arange(400), [20] * 20, lanes=1).reshape(20, 20) % 20
    assert len({tuple(row) for row in order}) == 20                   # no two shards in the same inner order
    again = shard_order(np.arange(400), [20] * 20, epoch=1, lanes=1).reshape(20, 20)
    assert (again // 20)[:, 0].tolist() != (shard_order(np.arange(400), [20] * 20, lanes=1).reshape(20, 20) // 20)[:, 0].tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("lanes", [1, 4, 6])
def test_ranks_resume_and_world_size(world, lanes):
    sizes, total = [5, 3, 7, 4], 4 * 19
    each = -(-total // world)
    ranks = [take(ShardSampler(sizes, r, world, 5, lanes=lanes), each) for r in range(world)]
    for epoch in range(4): assert sorted(i for rank in ranks for i, e in rank if e == epoch) == list(range(19))
    stream = take(ShardSampler(sizes, seed=5, lanes=lanes), each * world)
    assert [pair for together in zip(*ranks) for pair in together] == stream
    for start in (1, 7, each - 2): assert take(ShardSampler(sizes, 0, world, 5, start, lanes), each - start) == ranks[0][start:]


def test_ranks_have_lanes_of_their_own():
    for r in range(8):
        mine = np.array([i // 1000 for i, _ in take(ShardSampler([1000] * 64, r, 8, lanes=8), 900)])
        assert len(np.unique(mine)) <= 2


def test_sampler_for_leaves_other_sources_alone():
    assert type(sampler_for(open_images("toyworld:9"), 1, 3, 4, 5)) is StatelessSampler
    assert take(sampler_for(open_images("toyworld:9"), 1, 3, 4, 5), 30) == take(StatelessSampler(9, 1, 3, 4, 5), 30)
    for options in (dict(rank=2, world_size=2), dict(start=-1), dict(lanes=0)):
        with pytest.raises(ValueError): take(ShardSampler([3, 4], **options), 1)


# --- runs -------------------------------------------------------------------------------------------------------------

def looked(image, seed, index, epoch): return torch.tensor([value(image), index, epoch])


def run(source, start=0, count=12, world=1, workers=0, batch=2, **options):
    "What the ranks of a run see, step by step: rows of (value, index, epoch)."
    ranks = []
    for r in range(world):
        loader = DataLoader(Samples(source, looked, seed=1, **options), sampler=sampler_for(source, r, world, seed=1, start=start * batch, lanes=4), batch_size=batch,
                            num_workers=workers, timeout=60 if workers else 0)
        with guarded(loader) as batches: ranks.append(torch.stack([next(batches) for _ in range(count)]))
    return torch.stack(ranks, 1)                                      # [step, rank, batch, 3]


def test_resume_at_any_step_with_any_number_of_workers_and_ranks(tmp_path):
    spec = make(tmp_path / "data")
    (tmp_path / "data" / "shard-001.tar").write_bytes(packed([("a.png", b"bad"), ("b.png", png(6)), ("c.png", b"")]))
    (tmp_path / "data" / "shard-003.tar").unlink()
    whole = run(open_shards(spec), count=24, max_bad=1)
    for workers, start in ((2, 0), (0, 7), (2, 13), (1, 23)):
        assert torch.equal(run(open_shards(spec), start, 24 - start, workers=workers, max_bad=1), whole[start:])
    for world, workers in ((2, 0), (3, 0), (2, 1)):                   # the same stream, dealt to several ranks
        parts = run(open_shards(spec), 2, 24 // world - 2, world, workers, max_bad=1)
        assert torch.equal(parts.transpose(1, 2).reshape(-1, 3), whole.reshape(-1, 3)[4 * world:4 * world + 2 * world * len(parts)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_in_the_middle_of_a_run(tmp_path, workers):
    source = open_shards(make(tmp_path / "data", (20, 20, 20, 20)), n_open=1)
    samples = Samples(source, looked, seed=1, bad_images=tmp_path / "bad.jsonl", max_bad=0.5)
    loader = DataLoader(samples, sampler=sampler_for(source, seed=1, lanes=4), batch_size=4, num_workers=workers, timeout=60 if workers else 0)
    with guarded(loader) as batches:
        before = torch.cat([next(batches) for _ in range(5)])
        (tmp_path / "data" / "shard-002.tar").unlink()
        after = torch.cat([next(batches) for _ in range(35)])
    assert (before[:, 0] == before[:, 1]).all()
    replaced = after[after[:, 0] != after[:, 1]]
    assert len(replaced) and set((replaced[:, 1] // 20).tolist()) == {2}        # images of this shard only, and none of it
    assert not set((replaced[:, 0] // 20).tolist()) & {2}
    report = bad_image_report(tmp_path / "bad.jsonl")
    assert set(report) == {"shard"} and report["shard"] >= len(set(replaced[:, 1].tolist()))
    assert all(row["name"].startswith("shard-002.tar/") for row in map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines()))


def test_a_shard_that_is_missing_from_the_start_or_was_indexed_before(tmp_path):
    spec = make(tmp_path / "data", (5, 5, 5))
    (tmp_path / "data" / "shard-001.tar").rename(tmp_path / "away.tar")
    assert open_shards(spec).shards.tolist() == [5, 1, 5]
    (tmp_path / "away.tar").rename(tmp_path / "data" / "shard-001.tar")
    assert open_shards(spec).shards.tolist() == [5, 5, 5]
    (tmp_path / "data" / "shard-001.tar").unlink()
    source = open_shards(spec)                                        # a resumed run must find the same order
    assert source.shards.tolist() == [5, 5, 5]
    with pytest.raises(BadImage, match="shard-001.tar"): source[7]
    assert source.name(7) == "shard-001.tar/0007.png"
    with pytest.raises(FileNotFoundError, match="none of 2 shards"): open_shards(f"{tmp_path}/gone-{{0..1}}.tar")


def test_the_same_name_in_another_folder_is_another_shard(tmp_path, monkeypatch):
    make(tmp_path / "a", (3,))
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert values(open_shards("shard-000.tar")) == [0, 1, 2]
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(FileNotFoundError): open_shards("shard-000.tar")


def test_replacements_stay_near(tmp_path):
    source = open_shards(make(tmp_path / "data", (30, 30, 30, 30)))
    first = [source.stand_in(0, i, 0, 1) for i in range(30, 60)]
    assert {i // 30 for i in first} == {1} and len(set(first)) > 10
    for attempt in (2, 3, 4): assert len({source.stand_in(0, i, 0, attempt) // 30 for i in range(30, 60)}) == 1
    assert len({source.stand_in(0, 30, epoch, attempt) // 30 for epoch in range(40) for attempt in (2, 3)}) == 4


def test_too_many_lost_shards_or_bad_images_stop_the_run(tmp_path):
    spec = make(tmp_path / "data", (4,) * 10)
    source = open_shards(spec)
    (tmp_path / "data" / "shard-004.tar").unlink()
    samples = Samples(source, max_bad=0.1)
    for i in range(40): samples[i, 0]                                 # one of ten is not more than a tenth
    (tmp_path / "data" / "shard-005.tar").unlink()
    source._forget()
    with pytest.raises(RuntimeError, match="2 of 10 shards cannot be read.*shard-005"):
        for i in range(40): samples[i, 1]


def test_a_source_of_shards_can_be_sent_to_a_process_that_is_not_forked(tmp_path):
    source = open_shards(make(tmp_path / "data"))
    assert value(source[3]) == 3
    copy = pickle.loads(pickle.dumps(source))
    assert values(copy) == list(range(19)) and len(pickle.dumps(source)) < 3000


def test_no_more_shards_are_open_than_allowed(tmp_path):
    source = open_shards(make(tmp_path / "data", (1,) * 30), n_open=4)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    assert values(source) == list(range(30)) and len(source._open) == 4
    if before is not None: assert len(os.listdir("/proc/self/fd")) <= before + 8
