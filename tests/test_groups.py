"Groups: intervals and tests against scipy, hand-made cases, hostile lists of people."
import io
import json

import numpy as np
import pandas as pd
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
    assert g.join_groups(pd.Series(["a", pd.NA, pd.NaT, np.nan], dtype=object)).tolist() == ["a"] + ["unknown"] * 3


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


@pytest.mark.parametrize("n", [10, 62, 300])
def test_the_intervals_hold_rare_rates(n):
    "Exact coverage, by the binomial weights, where about three hits are expected: the bootstrap alone gets 85 %."
    ends = [g.group_rates(np.arange(n) < k, ["a"] * n)[0][3:5] for k in range(n + 1 if n < 20 else 20)]
    for rate in (0.5 / n, 1.5 / n, 3.1 / n, 5 / n):
        assert sum(scipy.stats.binom.pmf(k, n, rate) for k, (low, high) in enumerate(ends) if low <= rate <= high) > 0.92
    assert ends[1][1] > ends[0][1]                                 # one hit does not lower the upper end


def test_few_members_never_look_certain():
    pair = g.group_rates([0.33, 0.36], ["a", "a"])[0]
    assert pair.low < 0.1 and pair.high > 0.85
    person = g.group_rates([0.7] * 6, ["a"] * 6, clusters=list("pppqrr"))[0]       # sums and means of 0.7 differ in the last digit
    assert person.high - person.low == pytest.approx(g.unseen(3, 0.95)) and person.low == pytest.approx(0.7 * (1 - g.unseen(3, 0.95)))
    gap = g.largest_gap([0.7] * 6 + [0.2] * 50, ["a"] * 6 + ["b"] * 50, clusters=list("pppqrr") + list(range(50)), n_resamples=50)
    assert gap.high - gap.difference == pytest.approx(g.unseen(3, 0.95))
    assert g.group_rates([3, 4, 5.0], ["a"] * 3)[0].high <= 5      # not a share: the bootstrap's ends


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
    shuffled = np.ptp(g.shuffled_rates(g.make_units(values, groups), 3000, 0), axis=1)
    gap = g.largest_gap(values, groups)
    assert gap.difference == pytest.approx(judge.statistic) and abs((shuffled >= judge.statistic - 1e-12).mean() - judge.pvalue) < 0.02
    assert gap.p_value >= judge.pvalue - 0.02


def test_units_of_few_kinds_are_dealt_as_units_that_move():
    "Clusters of several sizes and sums: the counts of kinds follow the same law as real shuffles."
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(120), rng.integers(1, 4, 120))
    units = g.make_units(rng.random(len(people)) < 0.3, np.array(["a", "b", "c"])[people % 7 % 3], people)
    assert 3 * len(np.unique(units.sums + 1j * units.counts)) < len(units.group)
    dealt, deals = g.shuffled_rates(units, 2000, 0), [rng.permutation(units.group) for _ in range(2000)]
    moved = np.array([np.bincount(deal, units.sums) / np.bincount(deal, units.counts) for deal in deals])
    assert np.allclose(dealt.mean(0), moved.mean(0), atol=0.01) and np.allclose(dealt.std(0), moved.std(0), rtol=0.1)
    assert scipy.stats.ks_2samp(np.ptp(dealt, axis=1), np.ptp(moved, axis=1)).pvalue > 0.001
    sizes = np.bincount(units.group)
    kinds = g.deal_kinds(rng, np.array([70, 40, 10]), sizes, 5)
    assert (kinds.sum(2) == sizes).all() and (kinds.sum(1) == [70, 40, 10]).all() and (kinds >= 0).all()


def test_unequal_reliability_is_no_gap():
    "15 homes with 5 photographs against 150 with 60, half of them hits everywhere: shuffles alone raise false alarms in a third of the audits."
    n, homes = np.repeat([5, 60], [15, 150]), np.repeat(["a", "b"], [15, 150])
    gaps = [g.largest_gap(np.random.default_rng(i).binomial(n, 0.5) / n, homes, n_resamples=300, n_shuffles=300) for i in range(100)]
    assert np.mean([gap.p_value < 0.05 for gap in gaps]) <= 0.15
    assert np.mean([(gap.p_value < 0.05) == (gap.low > 0) for gap in gaps]) >= 0.95            # test and interval say the same


def test_p_values_reach_below_one_in_a_thousand():
    values, groups = np.arange(200) < 100, np.repeat(["a", "b"], 100)
    assert g.largest_gap(values, groups).p_value == 1 / 10_001 and g.largest_gap(values, groups, n_shuffles=99).p_value == 0.01


def test_equal_groups_are_still_two():
    gap = g.largest_gap([0, 1] * 100, np.repeat(["a", "b"], 100), n_resamples=50)
    assert (gap.highest, gap.lowest, gap.difference, gap.p_value) == ("a", "b", 0, 1)


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
    g.draw_rates(g.group_rates([1, 0], ["under $5", "$5 to \\frac$"]), title="$x{$", xlabel="$\\foo$").savefig(io.BytesIO())    # names are no formulas


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


def test_flags_may_be_true_and_false():
    assert [g.stated(v, float) for v in (True, False, "1", 0, pd.NA)] == [1, 0, 1, 0, None]


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
