"""The zoo: its facts against timm, transformers and our own networks; downloads against servers that behave badly."""
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from seer_nb import zoo
from seer_nb.regnet import REGNETY, count_parameters, regnety
from seer_nb.swav import SwAVHead
from seer_nb.core import cache_folder
from seer_nb.zoo import BASELINES, COPIES, SEER, ZOO, download, file_place, main, zoo_row, zoo_table

CONTENT = bytes(range(256)) * 12_000          # three MiB, nearly
OTHER = CONTENT[::-1]


# ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", sorted({row.network for row in ZOO.values()}))
def test_sizes_are_those_of_the_networks(name):
    with torch.device("meta"): net = regnety(name)
    rows = [row for row in ZOO.values() if row.network == name]
    assert {row.parameters for row in rows} == {count_parameters(net)}
    assert zoo.FEATURES[name] == net.num_features
    assert {row.head.widths[0] for row in rows if row.head} <= {net.num_features}


@pytest.mark.parametrize("slug", [slug for slug, row in ZOO.items() if row.head])
def test_heads_can_be_built(slug):
    "The count behind the computed sizes is that of a real head with these widths."
    row = ZOO[slug]
    first, *hidden, last = row.head.widths
    with torch.device("meta"): head = SwAVHead(first, tuple(hidden), last, row.head.prototypes, row.head.batch_norm)
    assert row.values == row.parameters + count_parameters(head)


@pytest.mark.parametrize("size, millions", {"32gf": 178.5, "64gf": 390.1, "128gf": 771.3, "256gf": 1431.0, "10b": 9628.9}.items())
def test_totals_with_head_are_the_known_ones(size, millions):
    assert round(SEER[f"seer_regnety_{size}"].values / 1e6, 1) == millions


def test_a_row_is_complete():
    for slug, row in ZOO.items():
        assert row.network in REGNETY and row.url.startswith("https://") and row.licence and row.container, slug
        assert bool(row.head) + bool(row.classes) + (row.copy_of != "") >= 1, slug
        assert all(score.source and score.protocol and score.metric for score in row.scores), slug
        assert all(len(digest) == 64 and not digest.strip("0123456789abcdef") for digest in row.sha256.values()), slug
    assert [slug for slug, row in ZOO.items() if row.preprocess.channels == "bgr"] == ["sup_regnety_64gf", "sup_regnety_128gf"]
    assert len({row.url for row in ZOO.values()}) == len(ZOO) == len({file_place(row.url) for row in ZOO.values()})


def test_table_has_every_row():
    pytest.importorskip("pandas")
    table = zoo_table()
    assert list(table.index) == list(ZOO) and table["size"].str.len().min() > 0


def timm_name(slug): return COPIES[slug].url.split("/timm/")[1].split("/")[0]


@pytest.mark.parametrize("slug", [slug for slug, row in COPIES.items() if row.names == "timm"])
def test_facts_are_timms(slug):
    "Hub repository, VISSL's address, image size and interpolation, as timm's own configs have them."
    timm = pytest.importorskip("timm")
    row = ZOO[slug]
    config = timm.get_pretrained_cfg(timm_name(slug))
    assert config.url == ZOO[row.copy_of].url
    assert row.url == f"https://huggingface.co/{config.hf_hub_id}{'' if '.' in config.hf_hub_id else config.architecture + '.' + config.tag}/resolve/main/model.safetensors"
    assert (config.num_classes or 0) == row.classes
    resize, crop, *_, normalize = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config.to_dict())).transforms
    assert (resize.size, crop.size, resize.interpolation.value) == (row.preprocess.resize, (row.preprocess.crop,) * 2, row.preprocess.interpolation)
    assert tuple(normalize.mean.tolist()) == pytest.approx(row.preprocess.mean) and tuple(normalize.std.tolist()) == pytest.approx(row.preprocess.std)


def test_no_copy_in_timm_is_missing():
    timm = pytest.importorskip("timm")
    published = {name for name in timm.list_models("*seer*", pretrained=True)}
    assert published == {timm_name(slug) for slug, row in COPIES.items() if row.names == "timm"}


def test_transformers_squeezes_the_image():
    transformers = pytest.importorskip("transformers")
    from PIL import Image
    recipe = ZOO["seer_regnety_32gf@transformers"].preprocess
    image = Image.new("RGB", (600, 400), "black")
    image.paste("white", (0, 0, 30, 400))          # a border that a crop from the middle would lose
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": recipe.crop})
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    assert recipe.warp and pixels.shape == (3, recipe.crop, recipe.crop) and pixels[0, :, 0].min() > pixels[0, :, -1].max()


# ── a server that does as it is told ─────────────────────────────────────────────────────────────────────────────────────────

class Site:
    "Files on the loopback, how they are served, and what was asked and sent."

    def __init__(self):
        self.files, self.etags, self.redirects = {"/w.bin": CONTENT}, {"/w.bin": '"1"'}, {}
        self.breaks = []            # bytes after which the next connections end
        self.ranges = True          # honour Range
        self.checks = True          # honour If-Range
        self.length, self.extra = True, 0    # send Content-Length, and so much too large
        self.chunked = False        # send the body in chunks
        self.status, self.type = 200, "application/octet-stream"
        self.sent, self.asked = [], []
        self.hold = None            # called between the two halves of a body

    def answer(self, handler):
        path, ask = handler.path.split("?")[0], handler.headers.get("Range")
        self.asked.append((path, ask))
        if path in self.redirects:
            handler.send_response(302)
            handler.send_header("Location", self.redirects[path])
            return handler.end_headers()
        if path not in self.files or self.status != 200: return handler.send_error(self.status if self.status != 200 else 404)
        content, etag = self.files[path], self.etags.get(path, "")
        start = int(ask[6:-1]) if ask and self.ranges and (not self.checks or handler.headers.get("If-Range") == etag) else 0
        if start >= len(content): return handler.send_error(416)
        handler.send_response(206 if start else 200)
        if start: handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.length: handler.send_header("Content-Length", len(content) - start + self.extra)
        handler.send_header("Content-Type", self.type)
        if etag: handler.send_header("ETag", etag)
        body = content[start:][: self.breaks.pop(0)] if self.breaks else content[start:]
        self.sent.append(len(body))
        if self.chunked: handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        if self.chunked: body = b"%x\r\n%s\r\n" % (len(content), body) + b"0\r\n\r\n" * (len(body) == len(content))
        if self.hold:
            handler.wfile.write(body[: 3 * len(body) // 4])
            self.hold()
            body = body[3 * len(body) // 4:]
        handler.wfile.write(body)


@pytest.fixture
def site(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"): monkeypatch.setenv(name, "127.0.0.1")
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.close_connection = True
            site.answer(self)

        def log_message(self, *_): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    site.root = f"http://127.0.0.1:{server.server_port}"
    site.url = site.root + "/w.bin"
    site.stop = lambda: (server.shutdown(), server.server_close())
    yield site
    site.stop()


def interrupted(site, folder, after=1_500_000):
    "Leave a part of `after` bytes behind."
    site.breaks[:] = [after, 0]
    with pytest.raises(ConnectionError, match="call again"): download(site.url, folder)
    site.sent.clear(); site.asked.clear()
    part = file_place(site.url, folder).with_name("w.bin.part")
    assert part.stat().st_size == after and not file_place(site.url, folder).exists()
    return part


def digest(content):
    import hashlib
    return hashlib.sha256(content).hexdigest()


# ── a transfer ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_file_comes_whole_and_once(site, tmp_path, capsys):
    path = download(site.url, tmp_path)
    assert path == file_place(site.url, tmp_path) and path.read_bytes() == CONTENT
    assert digest(CONTENT) in capsys.readouterr().out
    assert download(site.url, tmp_path) == path and len(site.asked) == 1
    assert {p.name for p in path.parent.iterdir()} <= {"w.bin", "w.bin.record.json", ".w.bin.lock"}


def test_a_dropped_connection_is_continued_at_once(site, tmp_path):
    site.breaks[:] = [2_000_000, 500_000]
    assert download(site.url, tmp_path).read_bytes() == CONTENT
    assert sum(site.sent) == len(CONTENT) and len(site.sent) == 3


def test_a_later_call_transfers_only_the_rest(site, tmp_path):
    interrupted(site, tmp_path)
    assert download(site.url, tmp_path).read_bytes() == CONTENT
    assert site.sent == [len(CONTENT) - 1_500_000] and site.asked == [("/w.bin", "bytes=1500000-")]


def test_a_part_that_was_only_not_renamed_needs_no_request(site, tmp_path):
    part = interrupted(site, tmp_path)
    part.write_bytes(CONTENT)
    site.stop()
    assert download(site.url, tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(site, tmp_path):
    interrupted(site, tmp_path)
    site.ranges = False
    assert download(site.url, tmp_path).read_bytes() == CONTENT and site.sent == [len(CONTENT)]


def test_a_server_without_ranges_that_always_breaks_ends_in_an_error(site, tmp_path):
    site.ranges, site.breaks = False, [1_000_000] * 50
    with pytest.raises(ConnectionError, match="ended at 1,000,000 of 3,072,000"): download(site.url, tmp_path)
    assert len(site.sent) <= 3


@pytest.mark.parametrize("checks", [True, False], ids=["honours If-Range", "ignores If-Range"])
def test_a_changed_file_starts_over(site, tmp_path, checks):
    interrupted(site, tmp_path)
    site.files["/w.bin"], site.etags["/w.bin"], site.checks = OTHER, '"2"', checks
    assert download(site.url, tmp_path).read_bytes() == OTHER


def test_a_file_that_became_shorter_starts_over(site, tmp_path):
    interrupted(site, tmp_path)
    site.files["/w.bin"], site.checks = CONTENT[:1000], False
    assert download(site.url, tmp_path).read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("etag", ["", 'W/"1"'])
def test_without_a_strong_version_nothing_is_glued_together(site, tmp_path, etag):
    site.etags["/w.bin"], site.checks, site.breaks = etag, False, [1_500_000, 1_500_000]
    with pytest.raises(ConnectionError): download(site.url, tmp_path)
    site.files["/w.bin"] = OTHER
    assert download(site.url, tmp_path).read_bytes() == OTHER and site.asked == [("/w.bin", None)] * 3


def test_a_damaged_note_beside_the_part_starts_over(site, tmp_path):
    part = interrupted(site, tmp_path)
    part.with_name("w.bin.part.json").write_text("{")
    assert download(site.url, tmp_path).read_bytes() == CONTENT


def test_a_length_that_is_too_large_never_ends_well(site, tmp_path):
    site.extra = 5
    for _ in range(2):
        with pytest.raises(ConnectionError, match="ended at"): download(site.url, tmp_path)
    assert not file_place(site.url, tmp_path).exists()


def test_a_length_that_is_too_small_is_caught_by_the_hash(site, tmp_path):
    site.extra = -5
    with pytest.raises(ValueError, match=digest(CONTENT)): download(site.url, tmp_path, sha256=digest(CONTENT))
    assert not file_place(site.url, tmp_path).exists()


def test_a_wrong_hash_leaves_nothing(site, tmp_path):
    with pytest.raises(ValueError, match="removed"): download(site.url, tmp_path, sha256="0" * 64)
    folder = file_place(site.url, tmp_path).parent
    assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".part")]
    assert download(site.url, tmp_path, sha256=digest(CONTENT).upper()).read_bytes() == CONTENT


def test_a_web_page_is_no_file(site, tmp_path):
    site.type = "text/html; charset=utf-8"
    with pytest.raises(ConnectionError, match="web page"): download(site.url, tmp_path)


def test_without_a_length_a_break_would_look_like_the_end(site, tmp_path):
    site.length, site.breaks = False, [1_000_000]
    with pytest.raises(ConnectionError, match="no length"): download(site.url, tmp_path)
    assert not file_place(site.url, tmp_path).exists()


def test_chunks_say_where_they_end(site, tmp_path):
    site.length, site.chunked, site.breaks = False, True, [1_000_000] * 9
    with pytest.raises(ConnectionError): download(site.url, tmp_path)
    assert not file_place(site.url, tmp_path).exists()
    site.breaks.clear()
    assert download(site.url, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [204, 206])
def test_only_200_is_a_whole_file(site, tmp_path, monkeypatch, status):
    opened = zoo._open
    def other(*args):
        response = opened(*args)
        response.status = status
        return response
    monkeypatch.setattr(zoo, "_open", other)
    with pytest.raises(ConnectionError, match=f"status {status}"): download(site.url, tmp_path)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_http_error_says_what_to_do(site, tmp_path, status):
    site.status = status
    with pytest.raises(ConnectionError) as error: download(site.url, tmp_path)
    assert all(word in str(error.value) for word in (f"HTTP {status}", site.url, str(file_place(site.url, tmp_path)), "By hand"))
    assert len(site.asked) == 1


def test_offline_and_by_hand(site, tmp_path, capsys):
    site.stop()
    with pytest.raises(ConnectionError, match="By hand"): download(site.url, tmp_path)
    place = file_place(site.url, tmp_path)
    place.write_bytes(CONTENT)
    assert download(site.url, tmp_path, sha256=digest(CONTENT)) == place
    with pytest.raises(ValueError, match="not the file asked for"): download(site.url, tmp_path, sha256="0" * 64)
    assert place.exists()                                  # somebody's file is not ours to remove


def test_a_silent_server(site, tmp_path, monkeypatch):
    def silence(*_): raise TimeoutError("timed out")
    monkeypatch.setattr(zoo, "_open", silence)
    with pytest.raises(ConnectionError, match="timed out"): download(site.url, tmp_path)


# ── disk and cache ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_no_room_is_noticed_before_the_first_byte(site, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1_000_000))
    with pytest.raises(OSError, match="the disk has 1 MB free") as error: download(site.url, tmp_path)
    place = file_place(site.url, tmp_path)
    assert not isinstance(error.value, ConnectionError) and not place.exists() and place.with_name("w.bin.part").stat().st_size == 0


def test_a_disk_that_fills_up_keeps_what_came(site, tmp_path, monkeypatch):
    def full(chunks, *_):
        yield next(chunks)
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(zoo, "progress", full)
        with pytest.raises(OSError, match="No space left") as error: download(site.url, tmp_path)
    assert not isinstance(error.value, ConnectionError) and len(site.sent) == 1 and not file_place(site.url, tmp_path).exists()
    assert download(site.url, tmp_path).read_bytes() == CONTENT and site.sent[-1] == len(CONTENT) - zoo.CHUNK


def test_a_second_call_reads_writes_and_locks_nothing(site, tmp_path, monkeypatch):
    path = download(site.url, tmp_path)
    for name in ("_sha256", "_alone", "_open", "write_atomic"): monkeypatch.delattr(zoo, name)
    assert download(site.url, tmp_path, sha256=digest(CONTENT)) == path


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 100), lambda p: p.write_bytes(OTHER)], ids=["truncated", "same size"])
def test_damage_is_noticed_and_mended(site, tmp_path, damage, capsys):
    path = download(site.url, tmp_path)
    os.utime(path, ns=(0, 0)); download(site.url, tmp_path)     # a touched file is read again, and good
    assert len(site.asked) == 1
    damage(path)
    assert download(site.url, tmp_path).read_bytes() == CONTENT
    assert "damaged" in capsys.readouterr().out and len(site.asked) == 2


def test_equal_names_do_not_collide(site, tmp_path):
    site.files["/other/w.bin"] = OTHER
    assert download(site.url, tmp_path).read_bytes() == CONTENT
    assert download(site.root + "/other/w.bin", tmp_path).read_bytes() == OTHER


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SEER_NB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path and file_place(ZOO["seer_regnety_32gf"].url).is_relative_to(tmp_path / "seer_regnety_32gf")
    monkeypatch.delenv("SEER_NB_CACHE")
    assert cache_folder().name == "seer_nb"


def test_two_processes_take_turns(site, tmp_path):
    began, go = threading.Event(), threading.Event()
    site.hold = lambda: (began.set(), go.wait(60))
    command = [sys.executable, "-u", "-m", "seer_nb.zoo", "download", site.url, "--folder", tmp_path]
    start = lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(zoo.__file__).parent.parent)
    with start() as first:
        assert began.wait(60)
        with start() as second:
            assert "another process is fetching" in second.stdout.readline()
            go.set()
            assert (first.wait(60), second.wait(60)) == (0, 0)
    assert file_place(site.url, tmp_path).read_bytes() == CONTENT and site.sent == [len(CONTENT)]


def test_a_killed_process_leaves_a_part_and_no_lock(site, tmp_path):
    site.files["/w.bin"] = CONTENT * 12                    # more than the sockets can hold
    began, go = threading.Event(), threading.Event()
    site.hold = lambda: (began.set(), go.wait(60))
    command = [sys.executable, "-m", "seer_nb.zoo", "download", site.url, "--folder", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(zoo.__file__).parent.parent) as process:
        assert began.wait(60)
        process.kill()
    go.set()
    site.hold = None
    have = file_place(site.url, tmp_path).with_name("w.bin.part").stat().st_size
    assert have > 0 and not file_place(site.url, tmp_path).exists()
    assert download(site.url, tmp_path).read_bytes() == CONTENT * 12 and site.sent[1:] == [len(CONTENT) * 12 - have]


# ── hostile addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/w.bin", "data:,x"])
def test_redirects_stay_within_http(site, tmp_path, target):
    site.redirects["/r"] = target
    with pytest.raises(ConnectionError, match="[Rr]edirect"): download(site.root + "/r", tmp_path)
    assert not file_place(site.root + "/r", tmp_path).exists()


def test_a_redirect_keeps_name_and_range(site, tmp_path):
    "As on the Hub, where every file is elsewhere."
    site.redirects["/w.pt"] = "/w.bin"
    site.breaks[:] = [1_000_000]
    path = download(site.root + "/w.pt?download=true", tmp_path)
    assert path.name == "w.pt" and path.read_bytes() == CONTENT and sum(site.sent) == len(CONTENT)


def test_a_redirect_in_circles_ends(site, tmp_path):
    site.redirects["/r"] = "/r"
    with pytest.raises(ConnectionError, match="30[0-9]"): download(site.root + "/r", tmp_path)


def test_https_is_not_left():
    handler = zoo._Redirect()
    ask = zoo.request.Request("https://example.org/w.bin")
    with pytest.raises(zoo.URLError): handler.redirect_request(ask, None, 302, "", {}, "http://example.org/w.bin")
    assert handler.redirect_request(ask, None, 302, "", {}, "https://example.com/w.bin").full_url == "https://example.com/w.bin"


@pytest.mark.parametrize("bad", ["file:///etc/hostname", "ftp://x/w", "data:,x", "http:///w", "https://[/w", "", "//x/w", "../w.bin"])
def test_other_addresses_are_refused(bad, tmp_path):
    with pytest.raises(ValueError): download(bad, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["/..%2f..%2fevil", "/..", "/", "/%2e%2e%5cevil.bin", "/.ssh", "/a b\u00e9", "/" + "x" * 999])
def test_no_name_leaves_its_folder(address, tmp_path):
    place = file_place("https://example.org" + address, tmp_path)
    assert place.parent.parent == tmp_path and place.name not in ("", ".", "..") and not place.name.startswith(".") and len(place.name) <= 120


# ── shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def put_index(site, names, **more):
    site.files["/m/model.safetensors.index.json"] = json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}, **more}).encode()
    return site.root + "/m/model.safetensors.index.json"


def test_an_index_brings_its_shards(site, tmp_path):
    site.files |= {"/m/a-1.safetensors": CONTENT, "/m/a-2.safetensors": OTHER}
    path = download(put_index(site, ["a-1.safetensors", "a-2.safetensors", "a-1.safetensors"]), tmp_path)
    assert path.with_name("a-1.safetensors").read_bytes() == CONTENT and path.with_name("a-2.safetensors").read_bytes() == OTHER
    assert len(site.asked) == 3
    site.stop()
    assert download(site.root + "/m/model.safetensors.index.json", tmp_path) == path


@pytest.mark.parametrize("name", ["../evil.bin", "/evil.bin", "..", "a/b.bin", "a\\b.bin", ".evil.bin", "x.bin\n", "evil.py", "", 7, ["x.bin"],
                                  "model.safetensors.index.json", "http://x/y.bin"])
def test_an_index_names_only_plain_files(site, tmp_path, name):
    with pytest.raises(ValueError, match="index.json"): download(put_index(site, ["good.bin", name]), tmp_path / "cache")
    assert len(site.asked) == 1 and [p.name for p in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": [1]}', b'{"weight_map": {}, "metadata": {"total_size": "x"}}',
                                     b'{"weight_map": {}, "metadata": 7}', b"[" * 100_000, b"\xff\xfe", b'{"weight_map": {}, "metadata": {"total_size": 1e999}}'])
def test_a_damaged_index_is_an_error(site, tmp_path, content):
    site.files["/model.bin.index.json"] = content or b" "
    with pytest.raises(ValueError, match="no index"): download(site.root + "/model.bin.index.json", tmp_path)


def test_shards_without_room_are_not_begun(site, tmp_path):
    site.files["/m/a.bin"] = CONTENT
    url = put_index(site, ["a.bin"], metadata={"total_size": 10**18})
    with pytest.raises(OSError, match="the disk has"): download(url, tmp_path)
    assert len(site.asked) == 1


def test_published_hashes_are_used(site, tmp_path, monkeypatch):
    site.files |= {"/m/a.bin": CONTENT, "/m/b.bin": CONTENT}
    row = zoo.PublicFile(put_index(site, ["a.bin", "b.bin"]), "regnety_32gf", 1, "pickle, sharded", "transformers", zoo.WARP_384,
                         sha256={"a.bin": digest(CONTENT), "b.bin": digest(OTHER)})
    monkeypatch.setitem(ZOO, "mine", row)
    with pytest.raises(ValueError, match="b.bin"): download("mine", tmp_path)
    assert (tmp_path / "mine/a.bin").exists() and not (tmp_path / "mine/b.bin").exists()
    assert zoo_row(row.url) is row and zoo_row(tmp_path / "mine/a.bin") is row


def test_licence_and_trouble_are_told_before_a_public_file_is_fetched(site, tmp_path, monkeypatch):
    monkeypatch.setitem(ZOO, "mine", zoo.dataclasses.replace(ZOO["seer_regnety_256gf"], url=site.url))
    lines = []
    download("mine", tmp_path, report=lines.append)
    assert zoo.SEER_LICENCE in lines[0] and "do not match" in lines[0] and digest(CONTENT) in lines[1]
    download("mine", tmp_path, report=lines.append)
    assert len(lines) == 3


def test_a_mirror_is_fetched_from_the_mirror(site, tmp_path):
    site.files["/seer_regnety_32gf/w.bin"] = OTHER
    assert download(site.root + "/seer_regnety_32gf/w.bin", tmp_path).read_bytes() == OTHER


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ZOO)


def test_the_path_is_the_last_line(site, tmp_path, capsys):
    assert main(["download", site.url, "--folder", str(tmp_path), "--sha256", digest(CONTENT)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(file_place(site.url, tmp_path))


@pytest.mark.parametrize("words", [["seer_regnety_32"], ["file:///x"], ["URL", "--sha256", "0" * 64], ["URL", "--sha256", "xyz"], ["URL/missing"]])
def test_a_mistake_is_one_line_and_status_2(site, tmp_path, capsys, words):
    words = [word.replace("URL", site.url) for word in words]
    assert main(["download", *words, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_baselines_and_copies_are_told_apart():
    assert set(ZOO) == set(SEER) | set(BASELINES) | set(COPIES) and all("@" in slug for slug in COPIES)
