"The geographical indicator against pandas and SciPy, and Dollar Street's two published formats."
import csv
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import hypergeom

from seer_nb.evaluate import fairness_geography as geo
from seer_nb.evaluate.tasks import open_model, read_results

torch.set_num_threads(1)


def save(path, colour=(90, 120, 30), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(sum(colour)).integers(0, 60, (*size, 3)).astype(np.uint8) + np.uint8(colour)).save(path)


def entry(home, label, url, income="120", region="Asia", **more):
    return {"_id": home, "id": f"{home}-{label}", "label": label, "country": "Nepal", "region": region, "income": income, "url": url, "lat": 28.0, "lng": 84.0} | more


AUTHORS = [
    entry("h1", "beds", "https://static.example/media/Nepal 1/image/5f/480x480-5f0c-aa1.jpg"),
    entry("h1", "bedrooms", "https://static.example/media/Nepal 1/image/5f/480x480-5f0c-aa1.jpg"),       # the same photograph
    entry("h1", "cups", "https://static.example/media/Nepal 1/image/60/480x480-60aa-bb2.jpg"),
    entry("h2", "beds", "https://static.example/media/Nepal 1/image/5f/480x480-5f0c-aa1.jpg", income=2500.5, region="The Americas", country="Peru", lat=-12.0, lng=-77.0),
    entry("h2", "cups", "https://static.example/x-cc3.jpg", income=2500.5, region="The Americas", country="Peru", lat=None, lng=None),
    entry("h3", "cups", "https://static.example/x-dd4.jpg", income="", region="Africa"),                      # no file, no income
    entry("h3", "family", "https://static.example/x-ee5.jpg", income="", region="Africa"),                    # a concept without a class
]


@pytest.fixture
def authors(tmp_path):
    root = tmp_path / "dollar_street"
    for k, e in enumerate(AUTHORS):
        if e["url"].endswith("dd4.jpg"): continue
        save(root / "images" / e["label"] / f"{e['_id']}.{'png' if k % 2 else 'jpg'}", (40 * (k % 4), 100, 30 * k))
    (root / "metadata_full_dollar_street.json").write_text(json.dumps(AUTHORS))
    (root / "in22k_cls_idx_to_dollar_street_labels_map.json").write_text(json.dumps({"0": ["beds", "bedrooms"], "1": ["cups"], "2": ["cups", "bowls"]}))
    return root


HEADER = ["id", "country.name", "country.id", "region.id", "type", "imageRelPath", "topics", "place", "income", "imagenet_synonyms", "imagenet_sysnet_id"]
ROWS = [["a1", "Burundi", "bi", "af", "image", "assets/a1.jpg", '["Beds", "Bedrooms"]', "54b4", "26.994581", '["studio couch"]', "[831]"],
        ["a2", "Burundi", "bi", "af", "image", "assets/a2.jpg", '["Cups"]', "54b4", "26.994581", '["cup", "mug"]', "[968, 504]"],
        ["b1", "France", "fr", "eu", "image", "assets/b1.jpg", "['Cups']", "60aa", "3000", '["cup"]', "[968]"]]


def write_table(root, name="images_v2_imagenet_test.csv", header=HEADER, rows=ROWS):
    root.mkdir(parents=True, exist_ok=True)
    with open(root / name, "w", newline="") as file: csv.writer(file).writerows([header, *rows])
    for row in rows: save(root / "assets" / f"{row[0]}.jpg")


# ── the metric ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_hit_rates_are_those_of_pandas():
    "Any entry of a photograph counts, then households, as a group-by does it."
    rng = np.random.default_rng(0)
    n, C = 2000, 30
    guesses = np.stack([rng.permutation(C)[:8] for _ in range(n)])
    targets = [set(rng.integers(0, C, rng.integers(1, 4)).tolist()) for _ in range(n)]
    homes, photographs = rng.integers(0, 60, n), rng.integers(0, 12, n)          # the numbers of photographs repeat over homes
    found = geo.household_hit_rates(guesses, targets, homes, photographs, top_k=5)
    table = pd.DataFrame({"home": homes, "photograph": photographs, "hit": [bool(set(g[:5]) & t) for g, t in zip(guesses.tolist(), targets)]})
    per_home = table.groupby(["home", "photograph"]).hit.max().groupby("home").agg(["mean", "size"])
    assert found.households.tolist() == per_home.index.tolist() and found.photographs.tolist() == per_home["size"].tolist()
    np.testing.assert_allclose(found.rates, per_home["mean"])


def test_order_and_pooling_do_not_matter_but_households_do():
    guesses, targets = [[1], [1], [1], [2]], [{1}, {1}, {1}, {3}]
    found = geo.household_hit_rates(guesses, targets, ["x", "x", "x", "y"], top_k=1)
    assert found.rates.tolist() == [1, 0] and found.rates.mean() == 0.5           # 75 % over photographs
    again = geo.household_hit_rates(guesses[::-1], targets[::-1], ["y", "x", "x", "x"], top_k=1)
    assert again.households.tolist() == ["x", "y"] and again.rates.tolist() == [1, 0]


@pytest.mark.parametrize("top_k", [1, 5])
def test_chance_is_hypergeometric(top_k):
    right = np.arange(1, 9)
    np.testing.assert_allclose(geo.chance_hit_rates(right, 108, top_k), 1 - hypergeom(108, right, top_k).pmf(0), rtol=1e-10)
    assert geo.chance_hit_rates([3], 3, 2)[0] == 1


def test_income_rule():
    "round(ln(income) / 3), and the ranges that the paper names."
    assert set(geo.income_buckets([27, 60, 90])) == {"low"} and set(geo.income_buckets([93, 500, 1700])) == {"medium"} and set(geo.income_buckets([1900, 10000])) == {"high"}
    incomes = np.geomspace(5, 30000, 500)
    expected = pd.Series((np.log(incomes) / 3).round()).map({1.0: "low", 2.0: "medium", 3.0: "high"})
    assert geo.income_buckets(incomes).tolist() == expected.tolist()
    assert geo.income_buckets([-5, None, 0, 1]).tolist() == ["unknown"] * 4


# ── the formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_authors_format(authors):
    found = geo.read_dollar_street(authors)
    assert [dict(zip(found.household, found.region)), dict(zip(found.household, found.country))] == [{"h1": "Asia", "h2": "Americas", "h3": "Africa"}, {"h1": "Nepal", "h2": "Peru", "h3": "Nepal"}]
    assert found.concepts == (("bedrooms", "beds"), ("cups",), ("beds",), ("cups",), ("family",))       # one home's duplicate is merged, another home's photograph stays
    assert found.left_out == {"no image file": 1, "the same photograph again": 1}
    np.testing.assert_array_equal(found.income, [120, 120, 2500.5, 2500.5, np.nan])
    np.testing.assert_array_equal(found.place[2:4], [[-12, -77], [np.nan, np.nan]])
    assert found.read(0).shape == (3, 40, 30) and found.read(0).dtype == torch.uint8 and found.names[1] == "images/cups/h1.jpg"


def test_mlcommons_format(tmp_path):
    write_table(tmp_path, rows=[*ROWS, ROWS[0]])
    (tmp_path / "assets/a2.jpg").unlink()
    found = geo.read_dollar_street(tmp_path)
    assert found.concepts == (("Beds", "Bedrooms"), ("Cups",)) and found.classes == ((831,), (968,))
    assert found.household.tolist() == ["54b4", "60aa"] and found.region.tolist() == ["Africa", "Europe"] and found.income.tolist() == [26.994581, 3000]
    assert found.left_out == {"no image file": 1, "the same photograph again": 1} and np.isnan(found.place).all()


def test_table_without_classes(tmp_path):
    "images_v2.csv has topics only: a label map of one's own is needed, and used."
    write_table(tmp_path, "images_v2.csv", HEADER[:9], [row[:9] for row in ROWS])
    found = geo.read_dollar_street(tmp_path)
    with pytest.raises(ValueError, match="label_map"): geo.right_classes(found, None, 1000)
    (tmp_path / "map.json").write_text('{"7": ["Cups"], "9": ["Cups", "Bedrooms"]}')
    kept, right = geo.right_classes(found, geo.read_label_map(tmp_path / "map.json"), 10)
    assert kept.tolist() == [0, 1, 2] and right == [{9}, {7, 9}, {7, 9}]


@pytest.mark.parametrize("change", [{"_id": "../../../h1"}, {"label": "/etc"}, {"label": "a/../../b"}])
def test_names_that_leave_the_folder(authors, change):
    (authors / "metadata_full_dollar_street.json").write_text(json.dumps([AUTHORS[0] | change]))
    with pytest.raises(ValueError, match="leads out"): geo.read_dollar_street(authors)


def test_table_that_leaves_the_folder(tmp_path):
    write_table(tmp_path)
    text = (tmp_path / "images_v2_imagenet_test.csv").read_text()
    (tmp_path / "images_v2_imagenet_test.csv").write_text(text.replace("assets/a1", "../assets/a1"))
    with pytest.raises(ValueError, match="leads out"): geo.read_dollar_street(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "[3]", "no json", '[{"_id": "h1"}]'])
def test_damaged_metadata(authors, text):
    (authors / "metadata_full_dollar_street.json").write_text(text)
    with pytest.raises(ValueError): geo.read_dollar_street(authors)


@pytest.mark.parametrize("cell", ["__import__('os').getcwd()", "968", "['Cups'"])
def test_lists_are_data_not_code(tmp_path, cell):
    write_table(tmp_path, rows=[ROWS[0][:6] + [cell] + ROWS[0][7:]])
    with pytest.raises(ValueError, match="no list"): geo.read_dollar_street(tmp_path)


@pytest.mark.parametrize("rows, what", [([ROWS[0][:4]], "row 1 has more or fewer"), ([ROWS[0], [*ROWS[1], "more"]], "row 2 has more or fewer"), ([ROWS[0][:1] + ["x" * 200_000] + ROWS[0][2:]], "field")])
def test_damaged_tables_are_named(tmp_path, rows, what):
    write_table(tmp_path, rows=rows)
    with pytest.raises(ValueError, match=f"images_v2_imagenet_test.csv.*{what}"): geo.read_dollar_street(tmp_path)


def test_files_have_a_limit(authors, tmp_path, monkeypatch):
    "Neither a file of terabytes nor one of a hundred thousand brackets is read to its end."
    (authors / geo.LABEL_MAP).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="no map"): geo.read_label_map(authors / geo.LABEL_MAP)
    write_table(tmp_path / "table")
    monkeypatch.setattr(geo, "JSON_LIMIT", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"): geo.read_dollar_street(tmp_path / "table")
    with pytest.raises(ValueError, match="more than 100 bytes"): geo.read_label_map(authors / geo.LABEL_MAP)
    (authors / "metadata_full_dollar_street.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="metadata_full"): geo.read_dollar_street(authors)


def test_what_photographs_of_a_home_may_say(authors):
    "An income that is not known twice is not two incomes; a photograph without an address is refused, not merged with the next one; regions are known in any case."
    path = authors / "metadata_full_dollar_street.json"
    path.write_text(json.dumps([e | {"income": float("nan"), "region": e["region"].lower()} for e in AUTHORS]))
    found = geo.read_dollar_street(authors)
    assert np.isnan(found.income).all() and set(found.region) == {"Asia", "Americas", "Africa"}
    for url in (None, "", 7, "https://static.example/"):
        path.write_text(json.dumps([e | {"url": url} for e in AUTHORS]))
        with pytest.raises(ValueError, match="metadata_full_dollar_street.json: the url"): geo.read_dollar_street(authors)


@pytest.mark.parametrize("text", ['{"x": ["beds"]}', '{"0": "beds"}', '["beds"]', "no json", '{"-1": ["beds"]}'])
def test_damaged_label_maps(tmp_path, text):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ValueError, match="no map"): geo.read_label_map(tmp_path / "map.json")


# ── the toy street ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_toy_street_holds_what_was_planted(tmp_path):
    homemade = geo.make_toy_households(tmp_path / "a", 40, seed=3, bias=0.6)
    assert homemade == geo.make_toy_households(tmp_path / "b", 40, seed=3, bias=0.6)
    one, two = geo.read_dollar_street(tmp_path / "a"), geo.read_dollar_street(tmp_path / "b")
    assert one.names == two.names and torch.equal(one.read(5), two.read(5))
    things = np.array(["portraits" not in c for c in one.concepts])
    rare, bucket = np.array([name in homemade for name in one.names])[things], geo.income_buckets(one.income)[things]
    for name, share in zip(("low", "medium", "high"), (0.8, 0.5, 0.2)):
        n = (bucket == name).sum()
        assert abs(rare[bucket == name].mean() - share) < 4 * np.sqrt(share * (1 - share) / n)


# ── curve and map ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_curve_counts_households_as_often_as_they_are_drawn():
    incomes, rates, at = np.array([50.0, 500.0, 5000.0]), np.array([0.1, 0.5, 0.9]), [80.0, 900.0]
    twice = geo.income_curve(np.r_[incomes, 50.0, 50.0], np.r_[rates, 0.1, 0.1], at)
    np.testing.assert_allclose(geo.income_curve(incomes, rates, at, counts=[3, 1, 1]), twice)
    np.testing.assert_allclose(geo.income_curve(incomes, np.stack([rates, rates]), at, counts=[[3, 1, 1], [1, 1, 1]]), [twice, geo.income_curve(incomes, rates, at)])


def test_figures_need_only_a_stored_result():
    homes = [{"country": "A", "latitude": 10.0, "longitude": 20.0, "income": 100.0, "rate": 0.5}, {"country": "B", "latitude": None, "longitude": None, "income": None, "rate": 0.7}]
    assert "1 households without a place" in geo.draw_countries(homes, "x").axes[0].get_title()
    assert len(geo.draw_incomes(homes).axes[0].lines[0].get_xdata()) == 1
    with pytest.raises(ValueError, match="coordinates"): geo.draw_countries(homes[1:])
    with pytest.raises(ValueError, match="income"): geo.draw_incomes(homes[1:])


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def train(root, classes):
    for k in range(classes):
        for i in range(6): save(root / "train" / f"n{k:02}" / f"{i}.png", (60 * k, 190 - 60 * k, 7 * i))


def test_run_on_the_authors_format(authors, tmp_path):
    "Everything is in the line of results.jsonl: groups, households, what was left out."
    train(authors, 3)
    config = geo.GeographyConfig(run_dir=str(tmp_path / "run"), task="dollar_street", root=str(tmp_path), image_size=32, train_folder="train", top_k=2, paper_model="SEERv2 RG-10B")
    result = geo.run_geography(config)
    assert result.n == 2 and result.details["photographs"] == 4 and result.details["left_out"] == {"no image file": 1, "the same photograph again": 1, "no class for the concept": 1}
    by_hand = np.mean([home["rate"] for home in result.details["households"]])
    assert result.value == pytest.approx(by_hand) and {home["household"]: home["photographs"] for home in result.details["households"]} == {"h1": 2, "h2": 2}
    assert result.chance == pytest.approx(np.mean([np.mean([2 / 3, 1.0])] * 2))                                 # beds: one of three classes; cups: two of three
    income = result.details["groups"]["income"]
    assert [(r["group"], r["n"], r["few"]) for r in income["rates"]] == [("high", 1, True), ("medium", 1, True)] and income["gap"] is None
    assert income["paper"] == {"high": 0.866, "medium": 0.785}
    assert read_results(tmp_path / "run/results.jsonl") == [result] and geo.run_geography(config) == result
    geo.draw_groups(read_results(tmp_path / "run/results.jsonl")[0].details["groups"])
    with pytest.raises(ValueError, match="other parameters"): geo.run_geography(dataclasses.replace(config, top_k=1))


def test_a_classifier_of_other_classes_with_its_own_map(authors, tmp_path):
    "A thousand outputs, and a label map of one's own that says which of them are right."
    (tmp_path / "map.json").write_text('{"999": ["beds"], "504": ["cups"]}')
    probe = open_model("random:regnety_toy")
    geo.save_probe(tmp_path / "probe.safetensors", torch.nn.Linear(352, 1000), probe)
    config = geo.GeographyConfig(run_dir=str(tmp_path / "run"), task="dollar_street", root=str(tmp_path), image_size=32, probe=str(tmp_path / "probe.safetensors"), label_map=str(tmp_path / "map.json"))
    result = geo.run_geography(config)
    assert result.details["classes"] == 1000 and result.details["photographs"] == 4 and result.chance == pytest.approx(5 / 1000)
    guesses, kept = np.load(tmp_path / "run/guesses.npy"), np.load(tmp_path / "run/photographs.npy")
    hits = [right in row for right, row in zip([999, 504, 999, 504], guesses.tolist())]
    assert kept.tolist() == [0, 1, 2, 3] and np.load(tmp_path / "run/hits.npy").tolist() == hits


def test_other_photographs_are_another_result(authors, tmp_path):
    train(authors, 3)
    config = geo.GeographyConfig(run_dir=str(tmp_path / "run"), task="dollar_street", root=str(tmp_path), image_size=32, train_folder="train", top_k=2)
    first = geo.run_geography(config)
    (authors / "images/cups/h2.png").unlink(missing_ok=True), (authors / "images/cups/h2.jpg").unlink(missing_ok=True)
    second = geo.run_geography(config)
    assert second.settings["data"] != first.settings["data"] and second.details["left_out"]["no image file"] == 2


def test_what_is_told_about_the_photographs_is_part_of_a_result(authors, tmp_path):
    "Neither other incomes, nor another map, nor other pictures to learn from return the old line."
    train(authors, 3)
    config = geo.GeographyConfig(run_dir=str(tmp_path / "run"), task="dollar_street", root=str(tmp_path), image_size=32, train_folder="train", top_k=2)
    first = geo.run_geography(config)
    (authors / "metadata_full_dollar_street.json").write_text(json.dumps([e | {"income": 50} for e in AUTHORS]))
    second = geo.run_geography(config)
    assert {home["income"] for home in second.details["households"]} == {50.0} and [r["group"] for r in second.details["groups"]["income"]["rates"]] == ["low"]
    (authors / geo.LABEL_MAP).write_text(json.dumps({"0": ["cups"], "1": ["beds", "bedrooms"], "2": ["bowls"]}))
    third = geo.run_geography(config)
    assert second.chance == pytest.approx(5 / 6) and third.chance == pytest.approx(2 / 3)
    save(authors / "train/n00/0.png", (9, 9, 9))
    assert geo.run_geography(config) not in (first, second, third) and len(read_results(tmp_path / "run/results.jsonl")) == 4


def test_interval_metric_and_a_smaller_batch(authors, tmp_path):
    "A classifier that never hits has no rate of exactly 0; the metric says how many guesses count; a run goes on with a smaller batch."
    write_map = lambda k: (tmp_path / "map.json").write_text(json.dumps({str(k): ["beds", "cups", "bedrooms"]}))
    probe, head = open_model("random:regnety_toy"), torch.nn.Linear(352, 10)
    torch.nn.init.zeros_(head.weight), head.bias.data.copy_(torch.arange(10.0))
    geo.save_probe(tmp_path / "probe.safetensors", head, probe)
    config = geo.GeographyConfig(run_dir=str(tmp_path / "run"), task="dollar_street", root=str(tmp_path), image_size=32, probe=str(tmp_path / "probe.safetensors"), label_map=str(tmp_path / "map.json"), top_k=3)
    write_map(0)
    missed = geo.run_geography(config)
    assert missed.value == missed.ci_low == 0 and missed.ci_high > 0.5 and missed.metric == "hit rate per household, top-3"
    write_map(9)
    hit = geo.run_geography(dataclasses.replace(config, extract_batch=1))
    assert hit.value == hit.ci_high == 1 and hit.ci_low < 0.5


@pytest.mark.parametrize("change, what", [({"extract_batch": 0}, "extract_batch must be at least 1"), ({"image_size": -3}, "image_size must be at least 0"), ({"image_size": 0}, "give image_size")])
def test_sizes_that_cannot_be(authors, tmp_path, change, what):
    train(authors, 3)
    save(authors / "images/cups/h1.png", size=(30, 50)), (authors / "images/cups/h1.jpg").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=what):
        geo.run_geography(geo.GeographyConfig(**{"run_dir": str(tmp_path / "run"), "task": "dollar_street", "root": str(tmp_path), "image_size": 32, "train_folder": "train", "top_k": 2} | change))
    assert not (tmp_path / "run").exists()


def test_a_classifier_of_other_classes_is_refused(authors, tmp_path):
    train(authors, 2)                               # the label map speaks of a class 2
    with pytest.raises(ValueError, match="class 2"):
        geo.run_geography(geo.GeographyConfig(run_dir=str(tmp_path / "run"), task="dollar_street", root=str(tmp_path), image_size=32, train_folder="train", top_k=2))
    assert not (tmp_path / "run").exists()


def test_missing_data_say_where_to_get_them(tmp_path, authors):
    config = geo.GeographyConfig(run_dir=str(tmp_path / "run"), task="dollar_street", root=str(tmp_path / "nowhere"), train_folder="train")
    with pytest.raises(FileNotFoundError, match="gapminder.org"): geo.run_geography(config)
    with pytest.raises(FileNotFoundError, match="train_folder"): geo.run_geography(dataclasses.replace(config, root=str(tmp_path)))
    (authors / "in22k_cls_idx_to_dollar_street_labels_map.json").unlink()
    with pytest.raises(FileNotFoundError, match="labels_map"): geo.run_geography(dataclasses.replace(config, root=str(tmp_path)))
    assert not (tmp_path / "run").exists()
