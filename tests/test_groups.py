"Groups: intervals and tests against scipy, hand-made cases, hostile lists of people."
import json

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from seer_nb.evaluate import groups as g


def made_up(n=240, seed=0):
    rng = np.random.default_rng(seed)
    groups = rng.choice(["a", "b", "c"], n, p=[0.5, 0.3, 0.2])
    return rng.random(n) < np.select([groups == "a", groups == "b"], [0.3, 0.4], 0.55), groups


def test_a_missing_attribute_makes_the_group_unknown():
    joined = g.join_groups(["female", "male", None, "male", "female"], ["darker", "", "lighter", float("nan"), "unknown"])
    assert joined.tolist() == ["female × darker"] + ["unknown"] * 4
    assert g.join_groups([], []).tolist() == []


def test_rates_by_hand():
    rates = g.group_rates([1, 0, 1, 1, 0.5], ["b", "b", "a", None, "a"], min_size=2, n_resamples=50)
    assert [(r.group, r.n, r.value, r.few) for r in rates] == [("a", 2, 0.75, False), ("b", 2, 0.5, False), ("unknown", 1, 1.0, True)]
    assert all(r.low <= r.value <= r.high for r in rates)


def test_intervals_are_scipys_percentile_bootstrap():
    values, groups = made_up(1200)
    for rate in g.group_rates(values, groups, n_resamples=4000):
        own = values[groups == rate.group].astype(float)
        judge = scipy.stats.bootstrap((own,), np.mean, method="percentile", n_resamples=4000, random_state=0).confidence_interval
        assert rate.value == own.mean() and abs(rate.low - judge.low) < 0.012 and abs(rate.high - judge.high) < 0.012


@pytest.mark.parametrize("hits", [0, 62])
def test_groups_without_spread_get_exact_ends(hits):
    rate = g.group_rates(np.arange(62) < hits, ["70+"] * 62)[0]
    judge = scipy.stats.binomtest(hits, 62).proportion_ci(method="exact")
    assert (rate.low, rate.high) == pytest.approx((judge.low, judge.high))


def test_clusters_are_drawn_whole():
    people = np.repeat(np.arange(40), 25)
    values = (people % 4 == 0).astype(float)                       # a person is always or never a hit
    alone, together = (g.group_rates(values, ["x"] * 1000, clusters=c)[0] for c in (None, people))
    persons = g.group_rates(values[::25], ["x"] * 40)[0]
    assert together.high - together.low == pytest.approx(persons.high - persons.low, abs=0.03) and alone.high - alone.low < 0.25 * (together.high - together.low)
    assert together.few and not alone.few and together.n == 1000   # 40 people, 1,000 pictures
    missing = g.group_rates(values, ["x"] * 1000, clusters=[None] * 1000)[0]
    assert not missing.few and missing.high - missing.low == pytest.approx(alone.high - alone.low, abs=0.02)


def test_a_cluster_may_have_members_of_several_groups():
    rates = g.group_rates([1, 0, 1, 1], ["a", "b", "a", "b"], clusters=["p", "p", "q", "q"], min_size=2, n_resamples=50)
    assert [(r.group, r.n, r.value, r.few) for r in rates] == [("a", 2, 1.0, False), ("b", 2, 0.5, False)]
    assert g.largest_gap([1, 0, 1, 1], ["a", "b", "a", "b"], clusters=["p", "p", "q", "q"], n_resamples=50).highest == "a"


@pytest.mark.parametrize("kind", ["hits", "precisions"])
def test_the_p_value_is_scipys_permutation_test(kind):
    values, groups = made_up()
    values = values.astype(float) if kind == "hits" else values * 0.5 + np.random.default_rng(1).random(len(values)) * 0.5
    sizes = np.unique(groups, return_counts=True)[1]
    order = np.argsort(groups, kind="stable")
    judge = scipy.stats.permutation_test(np.split(values[order], sizes.cumsum()[:-1]), lambda *x: np.ptp([s.mean() for s in x]), vectorized=False, n_resamples=1500,
                                         alternative="greater", random_state=0)
    gap = g.largest_gap(values, groups, n_resamples=3000)
    assert gap.difference == pytest.approx(judge.statistic) and abs(gap.p_value - judge.pvalue) < 0.02


def test_shuffling_clusters_is_not_shuffling_pictures():
    people, groups = np.repeat(np.arange(40), 20), np.repeat(["a", "b"], 400)
    values = np.repeat(np.r_[np.arange(20) < 12, np.arange(20) < 8], 20)           # 12 against 8 of 20 people
    assert g.largest_gap(values, groups, clusters=people).p_value > 0.05 > g.largest_gap(values, groups).p_value


def test_unknown_and_small_groups_take_no_part_in_the_gap():
    values, groups = np.r_[np.zeros(100), np.ones(100), np.zeros(3)], np.repeat(["a", None, "c"], [100, 100, 3])
    assert g.largest_gap(np.r_[values, np.ones(50)], np.r_[groups, ["b"] * 50]).highest == "b"
    with pytest.raises(ValueError, match="two known groups of at least 50, got a"): g.largest_gap(values, groups, min_size=50)
    same = g.largest_gap(values, groups)
    assert same.difference == same.low == 0 and same.p_value == 1 and same.high == pytest.approx(g.unseen(3, 0.95))    # three people show nothing


def test_the_disparity_ratio_leaves_unknown_out():
    assert g.disparity_ratio(g.group_rates([1, 0, 1, 1, 0], ["a", "a", "b", "b", None])) == 0.5
    assert g.disparity_ratio(g.group_rates([0, 0], ["a", "b"])) == 1
    with pytest.raises(ValueError): g.disparity_ratio(g.group_rates([1], [None]))


def test_tables_and_figures_show_size_and_flag():
    rates = g.group_rates([1, 0, 1], ["a", "a", None])
    table = g.rate_table(rates)
    assert list(table.index) == ["a", "unknown"] and table.n.tolist() == [2, 1] and table["%"].tolist() == [50, 100] and (table[""] == "few").all()
    labels = [t.get_text() for t in g.draw_rates(rates, paper={"a": 0.4}).axes[0].get_yticklabels()]
    assert labels == ["unknown (1, few)", "a (2, few)"]


def write(root, rows):
    Image.new("RGB", (20, 12), (9, 8, 7)).save(root / "p.png")
    (root / "metadata.json").write_text(json.dumps(rows))


def test_casual_conversations(tmp_path):
    write(tmp_path, [{"age": 44, "gender": "Female", "img_path": "p.png", "skin-type": 5, "subject_id": 12},
                     {"age": "70", "gender": "N/A", "img_path": "p.png", "skin-type": "3", "subject_id": "13"},
                     {"age": None, "gender": "Other", "img_path": "p.png", "skin-type": "", "subject_id": None}])
    people = g.read_casual_conversations(tmp_path)
    assert people.attributes == {"gender": ["female", None, "other"], "age": [44, 70, None], "skin-type": [5, 3, None], "subject_id": ["12", "13", None],
                                 "skin tone": ["darker", "lighter", None], "age group": ["30-45", "70+", None]}
    assert people.read(2).shape == (3, 12, 20) and people.read(0)[:, 0, 0].tolist() == [9, 8, 7] and people.names == ("p.png",) * 3


@pytest.mark.parametrize("row, why", [
    ({"img_path": "../p.png"}, "leads out"), ({"img_path": "/etc/passwd"}, "leads out"), ({"img_path": "a\\..\\b"}, "leads out"), ({"age": 3}, "no img_path"),
    ({"img_path": "p.png", "age": 300}, "no age"), ({"img_path": "p.png", "age": 1e999}, "no age"), ({"img_path": "p.png", "gender": {"a": 1}}, "no attribute"),
    ({"img_path": "p.png", "skin-type": 2.5}, "1 to 6"), ("p.png", "list of JSON objects")])
def test_hostile_people(tmp_path, row, why):
    write(tmp_path, [row])
    with pytest.raises(ValueError, match=why) as error: g.read_casual_conversations(tmp_path)
    assert "metadata.json" in str(error.value)


@pytest.mark.parametrize("text", ["{}", "[]", "[1", "[" * 100_000, "\x00\x01"])
def test_files_that_are_no_list(tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match="metadata.json"): g.read_casual_conversations(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "metadata.json", "wb") as file: file.truncate(g.JSON_LIMIT + 1)
    with pytest.raises(ValueError, match="more than"): g.read_casual_conversations(tmp_path)


def test_which_list_is_read(tmp_path):
    with pytest.raises(FileNotFoundError): g.read_casual_conversations(tmp_path)
    (tmp_path / "CasualConversations.json").write_text('[{"img_path": "p.png"}]')
    assert len(g.read_casual_conversations(tmp_path).names) == 1
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="name the right one"): g.read_casual_conversations(tmp_path)


@pytest.mark.parametrize("bias", [0.0, 0.25, 1.0])
def test_the_planted_share_is_exact(tmp_path, bias):
    dark = g.make_toy_people(tmp_path, 120, seed=3, bias=bias)
    people = g.read_casual_conversations(tmp_path)
    groups = g.join_groups(people.attributes["gender"], people.attributes["skin tone"])
    own = groups == g.PLANTED
    assert dark[own].sum() == int(own.sum() * bias) and not dark[~own].any() and own.sum() > 15
    brightness = np.array([people.read(i).float().mean() for i in range(120)])
    assert (brightness[dark] < 30).all() and (brightness[~dark] > 80).all()
    assert all(torch.equal(g.toy_people(120, 3, bias).read(i), people.read(i)) for i in (0, 7, 119))
