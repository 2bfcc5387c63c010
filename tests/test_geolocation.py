"Geolocation: distances against scikit-learn, S2 cells against the published files, lists in the published formats, damaged ones refused."
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import haversine_distances

from seer_nb.evaluate import geolocation as geo
from seer_nb.evaluate.tasks import read_results

torch.set_num_threads(1)

# rows of GeoEstimation's cells_50_5000.csv: the mean of each lies in the cell itself
PUBLISHED = """0,8744,3376,39.28162046949048,-107.94343695171831
2,89c6c74,235,39.98461821276593,-75.21640030212768
6,47ab,3135,54.038759201276115,13.716050198724078
7,80858064,3516,37.79360935993973,-122.39572840671183
9,0f,4952,11.614377453150261,-9.831330920436127
14,4876034c,3683,51.507765811023624,-0.07717788188976363
19,0d422864,1187,40.42597664953669,-3.7081663445661275
48,6ad67,3461,-37.881414922565604,144.98150598497588
62,47e66e21,3104,48.85764000708888,2.3410544133376945
106,89c2588c,2275,40.77889105494514,-73.9746943151648
144,185,2748,-5.932977425764184,38.833265711790396
163,6d39,4938,-41.30764946273825,174.6500818147016
172,915,4733,-17.490126671878226,-69.48427769417436
220,7c001,1133,21.330363244483678,-157.70249624095305
235,31da194,4056,1.2807774933431997,103.84700374926064"""


def random_places(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([np.degrees(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)], 1)


def test_distances_are_scikit_learns():
    a, b = random_places(400), random_places(400, 1)
    b[:100] = a[:100] + 1e-4                                               # 11 m north, and some east
    expected = [haversine_distances(np.radians([p]), np.radians([q]))[0, 0] * 6371.0 for p, q in zip(a, b)]
    np.testing.assert_allclose(geo.great_circle_km(a, b), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(geo.great_circle_km(a, b), geo.great_circle_km(b, a))


def test_distances_by_hand():
    quarter = np.pi / 2 * 6371
    for a, b, km in (((90, 0), (90, 170), 0), ((90, 45), (0, -100), quarter), ((0, 180), (0, -180), 0), ((0, 179), (0, -179), quarter / 45),
                     ((-90, 0), (90, 0), 2 * quarter), ((0, 0), (0, 180), 2 * quarter), ((60, 0), (60, 180), quarter * 2 / 3)):
        assert geo.great_circle_km(a, b)[0] == pytest.approx(km, abs=1e-4), (a, b)


def test_accuracy_counts_nested_circles():
    north = lambda km: [np.degrees(km / 6371), 7.0]
    predicted, true = [north(km) for km in (0, 0.9, 24, 26, 199, 749, 751, 2499, 2501, 9000)], [[0.0, 7.0]] * 10
    np.testing.assert_allclose(geo.accuracy_within(predicted, true), [0.2, 0.3, 0.5, 0.6, 0.8])
    assert geo.accuracy_within(predicted, true, [10_000]).tolist() == [1.0]
    for bad in (([], []), ([[0, 0]], [[0, 0], [1, 1]])):
        with pytest.raises(ValueError): geo.accuracy_within(*bad)


def test_means_know_the_date_line_and_the_pole():
    means = geo.mean_places([(10, 179), (10, -179), (89, 0), (89, 180), (5, 6)], [0, 0, 1, 1, 2])
    assert means[0, 0] == pytest.approx(10, abs=0.01) and abs(means[0, 1]) == pytest.approx(180)
    assert means[1, 0] == pytest.approx(90) and means[2].tolist() == pytest.approx([5, 6])
    with pytest.raises(ValueError, match="no mean"): geo.mean_places([(0, 0), (0, 180)], [0, 0])


@pytest.mark.parametrize("bad", [[(91, 0)], [(0, 181)], [(np.nan, 0)], [(0, np.inf)], [(1, 2, 3)]])
def test_places_off_the_globe_are_refused(bad):
    with pytest.raises(ValueError): geo.check_places(bad)
    with pytest.raises(ValueError): geo.great_circle_km(bad, bad)
    with pytest.raises(ValueError): geo.leaf_ids(bad)


def test_cells_are_those_of_the_published_files():
    rows = [line.split(",") for line in PUBLISHED.splitlines()]
    ids = np.array([geo.read_token(row[1]) for row in rows], np.uint64)
    leaves = geo.leaf_ids([(float(row[3]), float(row[4])) for row in rows])
    assert geo.tokens([geo.ancestors(leaf, int(level)) for leaf, level in zip(leaves, geo.levels(ids))]) == [row[1] for row in rows]


def test_cells_where_s2_is_known():
    "Leaf cells at corners of faces, from S2's own library."
    known = {(90, 0): 0x5000000000000001, (-90, 0): 0xB000000000000001, (0, 180): 0x6FFFFFFFFFFFFFFF, (0, -180): 0x7000000000000001,
             (0, 0): 0x1000000000000001, (0, 90): 0x3000000000000001, (0, -90): 0x9000000000000001, (45, 0): 0x12AAAAAAAAAAAAAB}
    assert geo.leaf_ids(list(known)).tolist() == list(known.values())


def test_a_cell_lies_in_its_parents_and_nowhere_else():
    leaves = geo.leaf_ids(random_places(2000))
    assert len(np.unique(geo.ancestors(leaves, 0))) == 6 and len(np.unique(geo.ancestors(leaves, 1))) == 24
    assert (geo.levels(leaves) == 30).all() and (geo.levels(geo.ancestors(leaves, 7)) == 7).all()
    assert np.array_equal(geo.ancestors(geo.ancestors(leaves, 9), 4), geo.ancestors(leaves, 4))
    assert [geo.read_token(token) for token in geo.tokens(geo.ancestors(leaves, 11))] == geo.ancestors(leaves, 11).tolist()
    for bad in ("", "0", "g", "f1", "47e66e2100000000f", "..", "c4"):
        with pytest.raises(ValueError): geo.read_token(bad)


def naive_partition(places, smallest, largest):
    "GeoEstimation's rule, cell by cell."
    leaves = geo.leaf_ids(places)
    def split(members, level):
        name = geo.ancestors(leaves[members], level)
        for cell in np.unique(name):
            inside = members[name == cell]
            if level == 2 and len(inside) <= smallest: continue
            if len(inside) > largest and level < 30: yield from split(inside, level + 1)
            elif len(inside) > smallest: yield int(cell), len(inside)
    return dict(split(np.arange(len(places)), 2))


def test_partitions_follow_the_rule():
    places = np.concatenate([random_places(600), (48.85, 2.35) + np.random.default_rng(1).normal(0, 0.05, (400, 2)), np.tile((10.0, 20.0), (90, 1))])
    for smallest, largest in ((3, 40), (10, 200), (0, 5)):
        cells = geo.build_cells(places, smallest, largest)
        assert dict(zip(cells.ids.tolist(), cells.images.tolist())) == naive_partition(places, smallest, largest)
        found = geo.locate(geo.leaf_ids(places), cells)
        assert np.bincount(found[found >= 0], minlength=len(cells.ids)).tolist() == cells.images.tolist()
        own = geo.locate(geo.leaf_ids(cells.centres), cells)
        assert np.mean(own == np.arange(len(own))) > 0.9                   # most means lie in their cell
    with pytest.raises(ValueError, match="more than 5000"): geo.build_cells(places, 5000, 9000)


def test_partitions_combine_by_their_cells():
    places = geo.toy_places("train").coordinates
    coarse, fine = geo.build_cells(places, 5, 400), geo.build_cells(places, 5, 60)
    around, rng = geo.locate(fine.ids, coarse), np.random.default_rng(0)
    a, b = (np.log(rng.dirichlet(np.ones(len(cells.ids)), 7)) for cells in (coarse, fine))
    expected = [[np.exp(a[n, around[c]]) * np.exp(b[n, c]) for c in range(len(fine.ids))] for n in range(7)]
    np.testing.assert_allclose(np.exp(geo.combine_partitions([a, b], [coarse, fine])), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="lies in no cell"): geo.combine_partitions([b, a], [fine, coarse])


def cells_file(path, rows=PUBLISHED.splitlines(), header="class_label,hex_id,imgs_per_cell,latitude_mean,longitude_mean"):
    rows = [f"{i},{row.partition(',')[2]}" for i, row in enumerate(rows)]
    path.write_text("\n".join(["num_images: 4723695", "min_concept_probability: ---", header, *rows]) + "\n")
    return path


def test_published_cells_are_read(tmp_path):
    cells = geo.read_cells(cells_file(tmp_path / "cells.csv"))
    assert geo.tokens(cells.ids)[:3] == ["8744", "89c6c74", "47ab"] and cells.images[0] == 3376
    assert cells.centres[8].tolist() == [48.85764000708888, 2.3410544133376945]
    assert geo.locate(geo.leaf_ids(cells.centres), cells).tolist() == list(range(15))
    assert geo.locate(geo.leaf_ids([(0.0, -150.0)]), cells).tolist() == [-1]


@pytest.mark.parametrize("row", ["0,8744,1,95,0", "0,8744,1,nan,0", "0,zz,1,1,1", "0,87441", "0,8744,many,1,1"])
def test_damaged_cells_are_refused(tmp_path, row):
    with pytest.raises(ValueError, match="cells.csv"): geo.read_cells(cells_file(tmp_path / "cells.csv", [row]))


@pytest.mark.parametrize("rows", [[], ["0,8744,5,1,1", "1,8744,5,1,1"], ["0,47e,5,48,2", "1,47e66e21,5,48,2"]])
def test_partitions_that_overlap_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="cell"): geo.read_cells(cells_file(tmp_path / "cells.csv", rows))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no list of cells"): geo.read_cells(tmp_path / "other.csv")


HEADER = "IMG_ID,AUTHOR,LAT,LON,S3_Label,S16_Label,S365_Label,Prob_indoor,Prob_natural,Prob_urban"


def data_set(root, n_train=90, n_test=12, missing=5):
    "The toy planet as files in the published formats; some training photographs are gone."
    top = root / "im2gps"
    for split, table, folder, n in (("train", "mp16", "mp16", n_train), ("test", "im2gps", "images", n_test)):
        places, lines = geo.toy_places(split, n), [HEADER]
        for i in range(n):
            name = f"{i % 7:02x}/{i}.png"
            lines.append(f"{name},somebody@N00,{places.coordinates[i, 0]:.6f},{places.coordinates[i, 1]:.6f},2,12,353,0.2,0.1,0.7")
            (top / folder / name).parent.mkdir(parents=True, exist_ok=True)
            if split == "test" or i >= missing: Image.fromarray(places.read(i).permute(1, 2, 0).numpy()).save(top / folder / name)
        (top / f"{table}_places365.csv").write_text("\n".join(lines) + "\n")
    return top


def test_published_lists_are_read(tmp_path):
    top, toy = data_set(tmp_path), geo.toy_places("test", 12)
    train, test = (geo.read_places("im2gps", tmp_path, split) for split in ("train", "test"))
    assert (len(train), train.missing, len(test), test.missing) == (85, 5, 12, 0)
    assert torch.equal(test.read(3), toy.read(3)) and test.name(3) == "03/3.png"
    np.testing.assert_allclose(test.coordinates, toy.coordinates, atol=1e-6)
    few = geo.read_places("im2gps", tmp_path, "train", 40)
    assert len(few) + few.missing == 40 and set(few.names) <= set(train.names)
    (top / "images/03/3.png").unlink()
    with pytest.raises(FileNotFoundError, match="3.png"): geo.read_places("im2gps", tmp_path, "test")
    with pytest.raises(ValueError, match="500 were asked for"): geo.read_places("im2gps", tmp_path, "train", 500)
    with pytest.raises(FileNotFoundError, match="where to get it"): geo.read_places("im2gps3k", tmp_path, "test")


@pytest.mark.parametrize("row, message", [
    ("a.jpg,x,151.2,-33.9", "exchanged"), ("a.jpg,x,1,200", "longitude"), ("a.jpg,x,nan,2", "latitude"), ("a.jpg,x,inf,2", "latitude|exchanged"), ("a.jpg,x,,2", "line 2"),
    ("a.jpg,x,1", "line 2"), ("../a.jpg,x,1,2", "leads out"), ("/etc/passwd,x,1,2", "leads out"), ("b\\..\\..\\a.jpg,x,1,2", "leads out")])
def test_hostile_rows_are_refused(tmp_path, row, message):
    (tmp_path / "list.csv").write_text(f"{HEADER}\n{row}\n")
    with pytest.raises(ValueError, match=message): geo.read_list(tmp_path / "list.csv")


def test_a_list_without_rows_or_columns_is_refused(tmp_path):
    for text in ("", HEADER, "IMG_ID,AUTHOR\na.jpg,x\n"):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(ValueError, match="list.csv"): geo.read_list(tmp_path / "list.csv")


@pytest.mark.parametrize("solver", ["lbfgs", "sgd", "finetune"])
def test_a_run_on_files(tmp_path, solver):
    top = data_set(tmp_path)
    cells = geo.build_cells(geo.toy_places("train", 90).coordinates, 2, 30)
    cells_file(top / "cells_50_1000.csv", [f"0,{token},{n},{lat},{lon}" for token, n, (lat, lon) in zip(geo.tokens(cells.ids), cells.images, cells.centres)])
    config = geo.GeolocationConfig(run_dir=str(tmp_path / "run"), task="im2gps", root=str(tmp_path), cells="cells_50_1000.csv", solver=solver, l2_count=1, epochs=1, batch_size=64,
                                   paper_model="SEER 256GF")
    result = geo.run_geolocation(config)
    assert geo.run_geolocation(config) == result == read_results(tmp_path / "run/results.jsonl")[0]
    predicted = np.load(tmp_path / "run/predicted.npy")
    assert all(np.abs(cells.centres - p).sum(1).min() < 1e-9 for p in predicted)
    assert result.value == geo.accuracy_within(predicted, geo.read_places("im2gps", tmp_path, "test").coordinates, [25])[0]
    assert (result.n, result.paper, result.metric, result.details["missing"]) == (12, 0.439, "within 25 km", 5)
    assert [row["paper"] for row in result.details["within"].values()] == [0.152, 0.439, 0.583, 0.73, 0.835]
    assert result.details["within"]["city"]["chance"] == result.chance
    other = geo.run_geolocation(dataclasses.replace(config, paper_model=""))            # the same numbers, beside no published one
    assert (other.paper, other.value) == (None, result.value) and geo.run_geolocation(config) == result
    cells_file(top / "cells_50_1000.csv", [f"0,{token},{n},{lat},{lon}" for token, n, (lat, lon) in zip(geo.tokens(cells.ids), cells.images + 1, cells.centres)])
    assert geo.run_geolocation(config).settings["partitions"] != result.settings["partitions"]     # other cells are another measurement


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path):
    data_set(tmp_path, 20, 4, 0)
    base = geo.GeolocationConfig(run_dir=str(tmp_path / "run"), task="im2gps", root=str(tmp_path))
    for error, change in ((FileNotFoundError, {"cells": "cells_50_1000.csv"}), (ValueError, {"cells": "../cells.csv"}), (ValueError, {"cells": "/etc/passwd"}),
                          (ValueError, {"paper_model": "SEER"}), (ValueError, {"task": "toy_scenes"}), (ValueError, {"test_images": 5}), (ValueError, {"l2_low": 0.0})):
        with pytest.raises(error): geo.run_geolocation(dataclasses.replace(base, **change))
    assert not (tmp_path / "run").exists()


def test_the_blind_guess_has_most_photographs_around_it():
    "On every level about as many as around the best of all photographs, and those of two towns for one between them."
    places = np.concatenate([random_places(700), (51.5, -0.1) + np.random.default_rng(1).normal(0, 0.1, (500, 2))])
    for km in geo.LEVELS.values():
        share = lambda place: np.mean(geo.great_circle_km(place, places) <= km)
        assert share(geo.blind_guess(places, km)) >= 0.9 * max(map(share, places)) - 2 / len(places)
    assert np.linalg.norm(geo.blind_guess(places) - (51.5, -0.1)) < 0.1
    towns = np.repeat([(0.0, 0.0), (0.0, 30.0), (3.0, 15.0)], [50, 50, 1], axis=0)
    assert geo.blind_guess(towns, 2500).tolist() == pytest.approx([3, 15]) and geo.blind_guess(towns, 750)[0] == pytest.approx(0)


def test_chance_on_the_toy_planet_is_that_of_its_largest_towns():
    "Whoever knows the towns and nothing else names one of them: chance must not be lower."
    train, test = geo.toy_places("train"), geo.toy_places("test")
    within = geo.measure_places(test.coordinates[::-1], test.coordinates, train.coordinates, {})
    assert all(row["chance"] > least for row, least in zip(within.values(), (-1, 0.05, 0.06, 0.08, 0.15)))
    for row in within.values():
        if row["km"] < 25: continue
        town = max(geo.toy_towns(), key=lambda town: np.mean(geo.great_circle_km(town, train.coordinates) <= row["km"]))
        assert row["chance"] >= np.mean(geo.great_circle_km(town, test.coordinates) <= row["km"]) - 0.02


def test_every_toy_planet_lies_on_the_globe():
    "59 has a town at the date line."
    for seed in (0, 59): assert geo.check_places(geo.toy_places("train", seed=seed).coordinates).shape == (1500, 2)


def test_other_photographs_are_another_measurement(tmp_path):
    top = data_set(tmp_path, 60, 8, 0)
    config = geo.GeolocationConfig(run_dir=str(tmp_path / "run"), task="im2gps", root=str(tmp_path), cells="2-30", l2_count=1)
    settings = lambda: geo.geolocation_settings(config, *geo.open_places(config), "")["data"]
    first = settings()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(top / "images/00/0.png")
    second = settings()
    assert second["test"] != first["test"] and second["train"] == first["train"]
    text = (top / "im2gps_places365.csv").read_text().splitlines()
    (top / "im2gps_places365.csv").write_text("\n".join([*text[:-1], text[-1].replace(text[-1].split(",")[2], "12.5")]) + "\n")
    assert settings()["places"] != first["places"]


def test_hostile_tables_are_refused_by_name(tmp_path):
    (tmp_path / "list.csv").write_text(f"{HEADER}\n{'a' * 200_000},x,1,2\n")
    with pytest.raises(ValueError, match="list.csv"): geo.read_list(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("LAT,LON,IMG_ID\n1,2\n")
    with pytest.raises(ValueError, match="list.csv: line 2"): geo.read_list(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text(f"\ufeffIMG_ID,LAT,LON\na.jpg,1,2\n", encoding="utf-8")
    assert geo.read_list(tmp_path / "list.csv")[0] == ("a.jpg",)
    for row in (f"0,{'8' * 200_000},1,1,1", "0,8744,-5,1,1", f"0,8744,{'9' * 30},1,1"):
        with pytest.raises(ValueError, match="cells.csv"): geo.read_cells(cells_file(tmp_path / "cells.csv", [row]))


def test_paths_break_at_the_date_line():
    path = geo.great_circle_path((10, 170), (10, -170))
    assert np.isnan(path).any(1).sum() == 1 and np.nanmax(np.abs(np.diff(path[:, 1]))) < 5
    assert not np.isnan(geo.great_circle_path((0, 0), (0, 0))).any()
