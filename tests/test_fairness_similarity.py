"Same-attribute retrieval against scikit-learn and pandas, and the file names of UTK-Faces."
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors

from seer_nb.evaluate import fairness_similarity as sim
from seer_nb.evaluate.tasks import read_results
from seer_nb.regnet import regnety
from seer_nb.swav import SwAV, SwAVHead

torch.set_num_threads(1)
KS = (1, 5, 10, 50)


def problem(n=150, m=400, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    names = [rng.choice(["female", "male"], size) for size in (n, m)]
    features = [(rng.normal(size=(len(x), dim)) + 0.6 * np.outer(x == "female", np.ones(dim))).astype(np.float32) for x in names]
    return features[0], names[0], features[1], names[1]


def save(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(k).integers(0, 255, (32, 24, 3)).astype(np.uint8)).save(path)


# ── the metric ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_precision_is_scikit_learns():
    x, a, y, b = problem()
    found = sim.attribute_precision(x, a, y, b, KS)
    near = NearestNeighbors(n_neighbors=50, metric="cosine", algorithm="brute").fit(y).kneighbors(x, return_distance=False)
    for k in KS: np.testing.assert_allclose(found[k], (b[near[:, :k]] == a[:, None]).mean(1))


def test_group_means_are_those_of_pandas():
    x, a, y, b = problem()
    found, tone = sim.attribute_precision(x, a, y, b, (10,))[10], np.random.default_rng(1).choice(["darker", "lighter"], len(a))
    rates = {rate.group: (rate.n, rate.value) for rate in sim.group_rates(found, sim.join_groups(a, tone))}
    table = pd.DataFrame({"group": a, "tone": tone, "p": found}).groupby(["group", "tone"]).p.agg(["size", "mean"])
    assert rates == {f"{g} × {t}": (row["size"], pytest.approx(row["mean"])) for (g, t), row in table.iterrows()}


def test_blocks_lengths_and_files_do_not_matter(tmp_path):
    x, a, y, b = problem()
    whole = sim.attribute_precision(x, a, y, b, KS)
    np.save(tmp_path / "y.npy", y * np.random.default_rng(2).uniform(0.1, 9, (len(y), 1)).astype(np.float32))
    for database in (torch.from_numpy(y), np.load(tmp_path / "y.npy", mmap_mode="r")):
        again = sim.attribute_precision(torch.from_numpy(7 * x), a, database, b, KS, chunk=32, block=60)
        for k in KS: np.testing.assert_array_equal(again[k], whole[k])


def test_queries_that_cannot_be_answered():
    "Neither a missing gender nor one that the database lacks is a failure of the network."
    x, a, y, b = problem(n=6)
    names = ["female", "male", None, "", "other", float("nan")]
    found, chance = sim.attribute_precision(x, names, y, b, (1, 5)), sim.chance_precision(names, b)
    assert np.isfinite(found[5]).tolist() == np.isfinite(chance).tolist() == [True, True, False, False, False, False]
    assert chance[0] == (b == "female").mean() and chance[0] + chance[1] == pytest.approx(1)


def test_a_random_search_reaches_chance():
    x, a, y, b = problem(n=600, m=900)
    found = sim.attribute_precision(np.random.default_rng(3).normal(size=x.shape), a, np.random.default_rng(4).normal(size=y.shape), b, (10,))[10]
    assert abs(found.mean() - sim.chance_precision(a, b).mean()) < 0.03


def test_gaps_are_the_networks_not_the_databases():
    "At UTK-Faces' sizes a random search has a gap of four points, and a perfect search has none; in a balanced database nothing changes."
    rng = np.random.default_rng(5)
    names = np.repeat(["female", "male"], 1500)
    chance = sim.chance_precision(names, ["female"] * 11525 + ["male"] * 12583)
    people, config = np.arange(3000).astype(str), sim.SimilarityConfig(min_people=8)
    blind, seeing = (sim.grouping_details({10: v}, chance, names, people, config, {}) for v in (rng.binomial(10, chance) / 10, np.ones(3000)))
    assert sim.largest_gap(rng.binomial(10, chance) / 10, names).p_value < 0.05 < blind["gap"]["p_value"] and seeing["gap"]["difference"] == 0
    assert [rate["value"] for rate in blind["rates"]] == pytest.approx([0.478, 0.522], abs=0.015)                    # plain precisions
    values = rng.random(40)
    np.testing.assert_allclose(sim.at_equal_chance(values, np.full(40, 0.5)), values)
    assert (sim.at_equal_chance(np.ones(3), np.ones(3)) == 1).all()                                                # a database of one gender


@pytest.mark.parametrize("ks", [(0, 5), (401,), ()])
def test_numbers_of_neighbours_that_cannot_be(ks):
    with pytest.raises(ValueError, match="between 1 and"): sim.attribute_precision(*problem(), ks)


def test_database_without_attributes():
    x, a, y, b = problem()
    with pytest.raises(ValueError, match="3 of 400"): sim.attribute_precision(x, a, y, [None, "", "unknown", *b[3:]], KS)
    with pytest.raises(ValueError, match="399 attributes"): sim.attribute_precision(x, a, y, b[1:], KS)


# ── the formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name, expected", [
    ("26_1_2_20170116174525125.jpg.chip.jpg", (26, "female")), ("1_0_0_20161219140623097.jpg", (1, "male")), ("116_1_4_20170120134921760.jpg.chip.jpg", (116, "female")),
    ("55_0_0_20170116232725357jpg.chip.jpg", (55, "male")),                      # a name of the data set without its first dot
    ("39_1_20170116174525125.jpg.chip.jpg", None), ("61_1_20170109142408075.jpg.chip.jpg", None), ("61_3_20170109150557335.jpg.chip.jpg", None),
    ("200_1_2_20170116174525125.jpg", None), ("26_2_2_20170116174525125.jpg", None), ("26_1_7_20170116174525125.jpg", None), ("26_1_2.jpg", None), ("-1_1_2_20170116174525125.jpg", None),
    ("٢٦_1_2_20170116174525125.jpg", None)])
def test_utk_codes(name, expected): assert sim.utk_codes(name) == expected


def utk(root, n=60):
    for i in range(n): save(root / ("part1" if i % 3 else "") / f"{20 + i % 50}_{i % 2}_{i % 5}_20170116{i:09}.jpg.chip.jpg", i)
    save(root / "part1" / "39_1_20170116174525125.jpg.chip.jpg", 99)
    (root / "readme.txt").write_text("not a picture")


def conversations(root, n=40):
    rows = []
    for i in range(n):
        save(root / f"faces/{i}.png", 100 + i)
        rows.append({"age": str(18 + i) if i % 9 else "N/A", "gender": ("Female", "Male", "Other", "N/A")[min(i % 8, 3) if i % 8 > 1 else i % 2] if i < 16 else ("Female", "Male")[i % 2],
                     "img_path": f"faces/{i}.png", "skin-type": str(1 + i % 6), "subject_id": str(i // 2)})
    (root / "metadata.json").write_text(json.dumps(rows))
    return rows


def test_utk_faces(tmp_path):
    utk(tmp_path)
    faces, left = sim.read_utk_faces(tmp_path)
    assert len(faces.names) == 60 and left == {"malformed names": 1, "the same face again": 0}
    for name, age, gender in zip(faces.names, faces.attributes["age"], faces.attributes["gender"]):
        codes = name.split("/")[-1].split("_")
        assert (age, gender) == (int(codes[0]), {"0": "male", "1": "female"}[codes[1]])
    assert set(faces.attributes) == {"age", "gender"}                                # race is not read
    assert faces.read(3).shape == (3, 32, 24)
    with pytest.raises(FileNotFoundError): sim.read_utk_faces(tmp_path / "nowhere")


def write_records(root, names, **change):
    "VISSL's utk_dataset_metadata.json as its script writes it: codes of the names as words."
    record = lambda codes: {"age": int(codes[0]), "gender": {"0": "male", "1": "female"}[codes[1]], "race": ("white", "black", "asian", "indian", "others_hispanic_latino_middle_eastern")[int(codes[2])]}
    (root / sim.UTK_RECORDS).write_text(json.dumps({name: record(name.split("_")) | change for name in names}))


def test_vissls_files_choose_the_faces(tmp_path):
    utk(tmp_path)
    names = [name.split("/")[-1] for name in sim.read_utk_faces(tmp_path)[0].names]
    write_records(tmp_path, [*names[:40], "9_1_3_20170101000000999.jpg.chip.jpg"])
    faces, left = sim.read_utk_faces(tmp_path)
    assert sorted(name.split("/")[-1] for name in faces.names) == sorted(names[:40])
    assert left == {"malformed names": 0, "the same face again": 0, "not in VISSL's files": 21, "no image file": 1}
    np.save(tmp_path / sim.UTK_SEARCHED, np.array([f"manifold://ssl_framework/tree/datasets/utk_faces/images/{name}" for name in names[10:50]]))
    faces, left = sim.read_utk_faces(tmp_path)
    assert sorted(name.split("/")[-1] for name in faces.names) == sorted(names[10:40]) and left["no image file"] == 0      # in both
    (tmp_path / sim.UTK_RECORDS).unlink()
    assert len(sim.read_utk_faces(tmp_path)[0].names) == 40
    np.save(tmp_path / sim.UTK_SEARCHED, np.array(["a/nobody.jpg"]))
    with pytest.raises(ValueError, match="none of the 61 pictures"): sim.read_utk_faces(tmp_path)


def test_pictures_under_other_names_than_vissls_are_said_to_be_there(tmp_path):
    "`.jpg` here, `.jpg.chip.jpg` in VISSL's files: the data are not missing, and the message shows the form of the names, not a person's codes."
    save(tmp_path / "26_1_2_20170116174525125.jpg", 1)
    write_records(tmp_path, ["26_1_2_20170116174525125.jpg.chip.jpg"])
    with pytest.raises(ValueError, match=r"none of the 1 pictures in .* like '00_0_0_0{17}\.jpg\.chip\.jpg': remove those files"): sim.read_utk_faces(tmp_path)
    np.save(tmp_path / sim.UTK_SEARCHED, np.array(["a/nobody.jpg"]))
    with pytest.raises(ValueError, match="none of the 1 pictures"): sim.read_utk_faces(tmp_path)          # the two files have no name in common
    (tmp_path / "26_1_2_20170116174525125.jpg").unlink()
    with pytest.raises(FileNotFoundError): sim.read_utk_faces(tmp_path)


def test_a_list_of_addresses_is_no_larger_than_its_file(tmp_path, monkeypatch):
    "A header may promise 10**13 texts in 192 bytes."
    path = tmp_path / sim.UTK_SEARCHED
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<U100", "fortran_order": False, "shape": (10**13,)})
        file.write(bytes(64))
    with pytest.raises(ValueError, match=sim.UTK_SEARCHED): sim.read_addresses(path)
    np.save(path, np.array(["a/b.jpg", "c.jpg"]))
    assert sim.read_addresses(path) == ["a/b.jpg", "c.jpg"]
    monkeypatch.setattr(sim, "JSON_LIMIT", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"): sim.read_addresses(path)


def test_vissls_files_in_another_form(tmp_path):
    utk(tmp_path)
    name = sim.read_utk_faces(tmp_path)[0].names[0].split("/")[-1]
    write_records(tmp_path, [name], gender="female" if name.split("_")[1] == "0" else "male")
    with pytest.raises(ValueError, match=f"{sim.UTK_RECORDS}.*its name says"): sim.read_utk_faces(tmp_path)
    for text in ("[]", "{}", '{"a.jpg": 1}', '{"%s": {"age": [3], "gender": "male"}}' % name, "no json"):
        (tmp_path / sim.UTK_RECORDS).write_text(text)
        with pytest.raises(ValueError, match=sim.UTK_RECORDS): sim.read_utk_faces(tmp_path)
    (tmp_path / sim.UTK_RECORDS).unlink()
    for array in (np.array([name], dtype=object), np.array([[name]]), np.arange(3)):
        np.save(tmp_path / sim.UTK_SEARCHED, array)
        with pytest.raises(ValueError, match=sim.UTK_SEARCHED): sim.read_utk_faces(tmp_path)


def test_a_face_in_two_folders_is_searched_once(tmp_path):
    utk(tmp_path)
    one = sim.read_utk_faces(tmp_path)[0].names
    for name in one[:7]:
        again = tmp_path / "zz" / name
        again.parent.mkdir(parents=True, exist_ok=True)
        again.write_bytes((tmp_path / name).read_bytes())
    faces, left = sim.read_utk_faces(tmp_path)
    assert faces.names == one and left["the same face again"] == 7


def test_published_groups_are_named_as_ours():
    printed = sim.published_precisions("SEER 10B")["SEER 10B"]
    assert printed["female × darker"] == 0.903 and printed["lighter"] == 0.962 and "README" not in printed
    with pytest.raises(ValueError, match="did you mean"): sim.published_precisions("SEER 10 B")


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def data(tmp_path):
    utk(tmp_path / "data/utk_faces")
    return conversations(tmp_path / "data/casual_conversations")


def test_run_on_the_published_formats(data, tmp_path):
    config = sim.SimilarityConfig(run_dir=str(tmp_path / "run"), task="utk_faces", root=str(tmp_path / "data"), image_size=32, min_people=8, paper_model="SEER 10B")
    result = sim.run_similarity(config)
    genders = pd.Series([row["gender"] for row in data]).value_counts()
    left = result.details["left_out"]
    assert left == {"gender not recorded": genders["N/A"], "gender not in the database": genders["Other"], "malformed names": 1,
                    "the same face again": 0}
    assert result.n == genders["Female"] + genders["Male"] and result.details["database"] == {"female": 30, "male": 30} and result.chance == 0.5
    precision = np.load(tmp_path / "run/precision.npy")
    assert precision.shape == (4, 40) and result.value == pytest.approx(np.nanmean(precision[2])) and result.details["by_k"]["50"] == pytest.approx(np.nanmean(precision[3]))
    groups = result.details["groups"]
    assert list(groups) == ["gender", "skin tone", "gender × skin tone", "age"] and groups["age"]["rates"][-1]["group"] == "unknown"
    assert groups["gender"]["paper"] == {"female": 0.939, "male": 0.958} and sum(rate["n"] for rate in groups["age"]["rates"]) == result.n
    assert read_results(tmp_path / "run/results.jsonl") == [result] and sim.run_similarity(config) == result
    assert len(sim.draw_precisions(read_results(tmp_path / "run/results.jsonl")[0].details["groups"]).axes) == 4
    with pytest.raises(ValueError, match="other parameters"): sim.run_similarity(dataclasses.replace(config, tap="res4:1x1"))


def test_missing_data_say_where_to_get_them(data, tmp_path):
    config = sim.SimilarityConfig(run_dir=str(tmp_path / "run"), task="utk_faces", root=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="casual-conversations-dataset"): sim.run_similarity(config)
    (tmp_path / "data/utk_faces").rename(tmp_path / "data/elsewhere")
    with pytest.raises(FileNotFoundError, match="susanqq"): sim.run_similarity(dataclasses.replace(config, root=str(tmp_path / "data")))
    assert not (tmp_path / "run").exists()


def test_too_few_faces_are_refused_before_anything_is_written(data, tmp_path):
    config = sim.SimilarityConfig(run_dir=str(tmp_path / "run"), task="utk_faces", root=str(tmp_path / "data"), image_size=32, ks="10 100")
    with pytest.raises(ValueError, match="between 1 and the 60"): sim.run_similarity(config)
    assert not (tmp_path / "run").exists()


def test_what_is_told_about_people_is_part_of_a_result(data, tmp_path):
    "Whoever corrects the list gets another result, in the same folder, and with a smaller batch if need be."
    config = sim.SimilarityConfig(run_dir=str(tmp_path / "run"), task="utk_faces", root=str(tmp_path / "data"), image_size=32, min_people=8)
    first = sim.run_similarity(config)
    swap = {"Female": "Male", "Male": "Female"}
    rows = [row | {"gender": swap.get(row["gender"], row["gender"])} for row in data]
    (tmp_path / "data/casual_conversations/metadata.json").write_text(json.dumps(rows))
    second = sim.run_similarity(dataclasses.replace(config, extract_batch=16))
    assert second.settings["data"] == first.settings["data"] and second.settings["told"] != first.settings["told"]
    assert second.value == pytest.approx(1 - first.value) and read_results(tmp_path / "run/results.jsonl") == [first, second]


@pytest.mark.parametrize("change, what", [({"extract_batch": 0}, "extract_batch must be at least 1"), ({"image_size": -3}, "image_size must be at least 0"), ({"image_size": 0}, "give image_size")])
def test_sizes_that_cannot_be(data, tmp_path, change, what):
    Image.new("RGB", (50, 40)).save(tmp_path / "data/casual_conversations/faces/0.png")
    with pytest.raises(ValueError, match=what): sim.run_similarity(sim.SimilarityConfig(**{"run_dir": str(tmp_path / "run"), "task": "utk_faces", "root": str(tmp_path / "data"), "image_size": 32} | change))
    assert not (tmp_path / "run").exists()


def test_the_swav_head_is_a_tap(data, tmp_path):
    "The embedding that SwAV compares, as the paper's alternative to the trunk; its weights are part of the result."
    torch.manual_seed(0)
    swav = SwAV(regnety("regnety_toy"), SwAVHead(352, (24, 20), 8, 10)).eval()
    save_file({name: t.contiguous() for name, t in swav.state_dict().items()}, tmp_path / "swav.safetensors")
    config = sim.SimilarityConfig(run_dir=str(tmp_path / "head"), model=f"seer:{tmp_path / 'swav.safetensors'}", task="utk_faces", root=str(tmp_path / "data"), image_size=32, tap="head")
    head, trunk = sim.run_similarity(config), sim.run_similarity(dataclasses.replace(config, run_dir=str(tmp_path / "trunk"), tap="avgpool"))
    assert head.settings["weights"] != trunk.settings["weights"] and not np.array_equal(*(np.load(tmp_path / name / "precision.npy") for name in ("head", "trunk")), equal_nan=True)
