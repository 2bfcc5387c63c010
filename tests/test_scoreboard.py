"The scoreboard: what was measured, what is printed elsewhere and what is missing never change places."
import dataclasses
import json
import random

import numpy as np
import pandas as pd
import pytest
import torch

from seer_nb.evaluate import scoreboard, tasks
from seer_nb.evaluate.tasks import Result, append_result, published_rows

MEASURED = ("here", "std", "low", "high", "seeds", "n")


def a_result(**changes):
    base = dict(task="toy_scenes", model="m", protocol="knn", settings={"k": 20, "weights": "a"}, metric="top-1", value=0.5, ci_low=0.4, ci_high=0.6, n=100,
                seconds=1.0, chance=0.1, paper=None, paper_source="", seed=0)
    return Result(**(base | changes))


@pytest.fixture
def real_rows(monkeypatch):
    "Rows of three real tasks, whatever the table holds."
    for slug, group, protocol in (("imagenet_r", "robustness", "robustness"), ("dtd", "natural", "linear, knn"), ("gtsrb", "small", "linear, knn")):
        row = dataclasses.replace(tasks.ROWS["toy_scenes"], slug=slug, group=group, protocol=protocol)
        monkeypatch.setitem(tasks.ROWS, slug, row)


# ── measured and published numbers ───────────────────────────────────────────────────────────────────────────────────────────

def test_published_numbers_cannot_appear_in_a_measured_column():
    "Every published number is replaced by one that occurs nowhere else, and looked for where it must not be."
    rng = random.Random(0)
    results = [a_result(task=task, value=(v := rng.randrange(100, 900) / 1000), ci_low=v - 0.05, ci_high=v + 0.05, seed=s, settings={"k": k, "weights": "w"},
                        paper=0.7654321, paper_source="a table")
               for task in ("toy_scenes", "imagenet_r", "dtd") for k in (20, 200) for s in (0, 1)]
    table, without = scoreboard.score_table(results), scoreboard.score_table([dataclasses.replace(r, paper=None, paper_source="") for r in results])
    pd.testing.assert_frame_equal(table[[*MEASURED]], without[[*MEASURED]])          # the paper's number touches nothing measured
    assert not any(abs(table[column] - 76.54321).min() < 1e-6 for column in MEASURED) and table.paper.tolist() == [pytest.approx(76.54321)] * 6
    shown = scoreboard.readable(table)
    assert not shown["here, %"].str.contains("76.5").any() and shown["paper, %"].tolist() == ["76.5 [a table]"] * 6


def test_only_results_become_measured_rows():
    printed = scoreboard.published_table()
    assert not set(MEASURED) & set(printed.columns)
    for intruder in (published_rows()[0], printed.iloc[0], dataclasses.asdict(a_result())):
        with pytest.raises(TypeError, match="only what was measured"): scoreboard.score_table([a_result(), intruder])


def test_rows_of_the_published_file_are_no_results(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(published_rows()[0]) + "\n")
    with pytest.raises(ValueError, match="not a file of results"): scoreboard.collect_results(str(path))


def test_cells_keep_the_two_kinds_in_columns_of_their_own(real_rows):
    "In the figure, no column holds a filled and an outlined cell, and each number stands in a cell of its kind."
    table = scoreboard.score_table([a_result(task="imagenet_r", protocol="robustness", settings={}, value=0.123), a_result(task="dtd", value=0.321)])
    ax, = scoreboard.draw_cells(table, scoreboard.published_table()).axes
    filled, outlined = ([(p.get_x() + 0.45, p.get_y() + 0.45) for p in ax.patches if p.get_fill() is fill] for fill in (True, False))
    assert filled and outlined and max(x for x, _ in filled) < min(x for x, _ in outlined) - 1
    near = lambda text, cells: any(abs(text.get_position()[0] - x) + abs(text.get_position()[1] - y) < 1e-6 for x, y in cells)
    numbers = [t for t in ax.texts if t.get_text() not in ("·", "")]
    assert {t.get_text() for t in numbers if near(t, filled)} == {"12.3", "32.1"}
    assert all(near(t, filled) != near(t, outlined) for t in numbers) and "56.1" in {t.get_text() for t in numbers if near(t, outlined)}


def test_several_settings_of_a_protocol_show_their_range():
    table = scoreboard.score_table([a_result(value=0.2), a_result(value=0.4, settings={"k": 200}), a_result(protocol="linear", settings={}, value=0.6),
                                    a_result(protocol="linear_sgd", settings={}, value=0.3)])
    ax, = scoreboard.draw_cells(table, scoreboard.published_table(), tasks=["toy_scenes"]).axes
    assert {t.get_text() for t in ax.texts} - {"·"} == {"20–40", "30–60"}


# ── published numbers in one direction ───────────────────────────────────────────────────────────────────────────────────────

def test_errors_are_turned_and_say_so():
    printed = scoreboard.published_table()
    errors = printed[printed.printed.str.contains("error")]
    assert set(errors.task) == {"imagenet_r", "svhn", "mnist"}
    for row in errors.itertuples(): assert row.paper == pytest.approx(100 - float(row.printed.split()[0]))
    others = printed[~printed.printed.str.contains("error") & (printed.task != "hateful_memes")]
    assert all(row.paper == pytest.approx(float(row.printed.split()[0])) for row in others.itertuples())
    mnist = printed[printed.task == "mnist"]
    assert mnist.paper.nunique() == 1 and len(mnist) == 2         # the accuracy and the error that the source prints agree


def test_differences_bounds_and_other_quantities_are_left_out():
    printed = scoreboard.published_table()
    assert not printed.printed.str.contains("delta|relative|about|=").any()
    assert not printed.model.str.contains("minus").any()
    assert printed.task.isin(tasks.BENCHMARKS).all()


def test_the_more_exact_source_wins():
    cells = scoreboard.seer_cells(scoreboard.published_table()).set_index(["task", "protocol", "model"])
    assert not cells.index.duplicated().any()
    assert cells.paper["imagenet_a", "robustness", "SEER 10B"] == 52.7          # table 52.7, figure 52.0
    assert cells.paper["imagenet1k", "finetune", "SEER 256GF"] == 85.2          # table 85.2, figures 85.1
    assert cells.precision["imagenet_sketch", "robustness", "SEER 128GF"] == "digitised"


def test_two_networks_of_one_size_have_columns_of_their_own():
    "A finetuning of 2021 and one of 2022; the bars and the curves of two figures, 44 and 40.3 % on Sketch."
    printed = scoreboard.published_table()
    cells = scoreboard.seer_cells(printed).set_index(["task", "protocol", "model"]).paper
    assert (cells["imagenet_sketch", "robustness", "SEER 128GF"], cells["imagenet_sketch", "robustness", "SEER 128GF, other finetuning"]) == (40.3, 44)
    assert (cells["imagenet1k", "finetune", "SEER 128GF"], cells["imagenet1k", "finetune", "SEER-2021 128GF"]) == (84.5, 83.8)
    ax, = scoreboard.draw_cells(scoreboard.score_table([a_result()]), printed, tasks=["imagenet1k"]).axes
    columns = [t.get_text() for t in ax.get_xticklabels()]
    row = {columns[round(t.get_position()[0] - 1.5) + 1]: t.get_text() for t in ax.texts if t.get_position()[1] == 0 and t.get_position()[0] > 0}
    assert row["SEER 128GF"] == "84.5" and row["SEER-2021 128GF"] == "83.8" and row["SEER 128GF, other finetuning"] == "·"


def test_new_protocols_are_on_the_board():
    printed = scoreboard.published_table()
    assert printed[printed.task == "copydays"].set_index("model").paper["SEER 10B"] == 90.6 and set(printed[printed.task == "copydays"].protocol) == {"copies"}
    state = scoreboard.coverage(scoreboard.score_table([a_result(task="toy_people", protocol="labels", chance=None)]), printed).set_index(["task", "protocol"]).state
    assert (state["copydays", "copies"], state["im2gps", "geolocation"], state["hateful_memes", "memes"]) == ("published",) * 3
    assert (state["casual_conversations", "labels"], state["wikiart", "style"], state["toy_people", "labels"]) == ("missing", "missing", "measured here")
    assert ("imagenet1k", "knn") in state.index and not printed[(printed.protocol == "knn") & printed.model.str.startswith("SEER")].size


@pytest.mark.parametrize("model, network", [("SEER IG-1B RG-128GF", "regnety_128gf"), ("SEER RegNet10B", "regnety_10b"), ("SEER 700M (128GF)", "regnety_128gf"), ("RegNetY-1.6GF", "regnety_1_6gf"),
                                            ("random:regnety_3_2gf", "regnety_3_2gf"), ("seer:runs/regnety_400mf/backbone.safetensors", "regnety_400mf"), ("DINO DeiT-B/16", ""),
                                            ("SimCLR-v2 ResNet152-w3+SK", ""), ("SwAV IN1K 691M (RG-128GF)", "regnety_128gf"), ("SEERv2 RG-10B", "regnety_10b"), ("resnet50", "")])
def test_networks_are_read_from_names(model, network): assert scoreboard.network_in(model) == network


# ── what is missing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_coverage_names_every_planned_cell_once(real_rows):
    table = scoreboard.score_table([a_result(task="dtd", protocol="linear_sgd", settings={}), a_result(task="imagenet_r", protocol="robustness", settings={}), a_result(task="unknown")])
    state = scoreboard.coverage(table, scoreboard.published_table()).set_index(["task", "protocol"])
    assert not state.index.duplicated().any()
    expected = {("dtd", "linear"): "measured and published", ("imagenet_r", "robustness"): "measured and published", ("unknown", "knn"): "measured here",
                ("dtd", "knn"): "missing", ("gtsrb", "knn"): "missing", ("gtsrb", "linear"): "missing", ("svhn", "linear"): "published"}
    assert {key: state.state[key] for key in expected} == expected
    assert set(state.state) <= {"measured and published", "measured here", "published", "missing"}
    assert {(slug, p) for slug, row in tasks.ROWS.items() for p in row.protocol.split(", ")} <= set(state.index)
    nothing = scoreboard.coverage(scoreboard.score_table([]), scoreboard.published_table())
    assert nothing.models_here.sum() == 0 and set(nothing.state) == {"published", "missing"}


def test_groups(real_rows):
    group = scoreboard.task_group
    assert [group("dtd", "linear"), group("dtd", "corruption"), group("dtd", "lowshot"), group("toy_scenes", "lowshot"), group("nothing", "linear")] == \
        ["natural", "robustness", "few labels", "toy", "other"]


# ── rows, networks, intervals ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("task, protocol, settings, row", [
    ("dtd", "limited", {"limit": 1000, "balanced": True}, "dtd_1000"), ("dtd_1000", "limited", {"limit": 1000, "balanced": True}, "dtd_1000"),
    ("dtd", "finetune", {"train_images": 1000, "balanced": True}, "dtd_1000"), ("dtd", "finetune", {"train_images": 1000, "balanced": False}, "dtd"),
    ("dtd_1000", "finetune", {"train_images": 1000}, "dtd_1000"), ("dtd", "finetune", {"train_images": 1000}, "dtd_1000"), ("dtd", "linear", {"train_images": 1000}, "dtd"),
    ("dtd", "limited", {"limit": 999, "balanced": True}, "dtd"), ("dtd", "limited", {"limit": 1000, "balanced": False}, "dtd"), ("mnist", "limited", {"limit": 1000, "balanced": True}, "mnist"),
    ("voc07", "lowshot", {"k": 4}, "voc07_lowshot"), ("places205", "lowshot", {"k": 4}, "places205_lowshot"), ("dtd", "lowshot", {"k": 4}, "dtd"), ("voc07", "svm", {}, "voc07")])
def test_few_labels_reach_their_row(task, protocol, settings, row):
    "As the low-shot and finetuning pages write them, on the task they opened."
    table = scoreboard.score_table([a_result(task=task, protocol=protocol, settings=settings)])
    assert table.task.tolist() == [row]
    state = scoreboard.coverage(table, scoreboard.published_table()).set_index(["task", "protocol"]).state
    assert state[row, protocol].startswith("measured")
    if row != task: assert (task, protocol) not in state.index or not state[task, protocol].startswith("measured")


def test_low_shot_pages_write_what_the_board_reads():
    "The names of the settings that decide the row are fields of their configurations."
    from seer_nb.evaluate import finetune, lowshot
    assert {"limit", "balanced"} <= set(lowshot.PROTOCOLS["limited"]) and "train_images" in finetune.FinetuneConfig.__dataclass_fields__


def test_another_network_under_an_old_name_is_not_averaged():
    w = lambda weights, seed, value: a_result(settings={"k": 20, "weights": weights}, seed=seed, value=value)
    table = scoreboard.score_table([w("a", 0, 0.5), w("a", 1, 0.6), w("b", 0, 0.9)])                      # measured with two seeds, then trained again
    assert table.here.tolist() == [pytest.approx(55), pytest.approx(90)] and table.apart.tolist() == ["weights=a", "weights=b"] and table.seeds.tolist() == [2, 1]
    table = scoreboard.score_table([w("old", 0, 0.9), w("a", 0, 0.4), w("b", 1, 0.5), w("c", 2, 0.6)])    # three pretrainings, the first one twice
    assert table.here.tolist() == [90, pytest.approx(50)] and table.weights.tolist() == ["old", "3 networks"]
    assert scoreboard.readable(table)["differs in"].tolist() == ["weights=old", "weights=3 networks"]
    assert scoreboard.score_table([w("a", 0, 0.5), w("a", 0, 0.6)]).here.tolist() == [60]                 # the same once more: the newer one
    ax, = scoreboard.draw_cells(table, scoreboard.published_table(), tasks=["toy_scenes"]).axes
    assert {"m [old]", "m [3 networks]"} <= {t.get_text() for t in ax.get_xticklabels()}


def test_rows_that_share_a_cell_say_what_differs():
    rows = [a_result(settings={"k": 20, "image_size": size, "train_images": n}) for size, n in ((0, 0), (224, 0), (224, 500))]
    table = scoreboard.score_table([*rows, a_result(task="dtd")])
    assert table.apart.tolist() == ["image_size=0, train_images=0", "image_size=224, train_images=0", "image_size=224, train_images=500", ""]
    fig = scoreboard.draw_scoreboard(table)
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {*(f"m ({text})" for text in table.apart[:3]), "m", "chance"}
    assert scoreboard.score_table([a_result(settings={"solver": "sgd"}, protocol="linear"), a_result(settings={"lr": 1}, protocol="linear")]).apart.tolist() == ["solver=sgd, lr=–", "solver=–, lr=1"]


def test_an_interval_is_called_what_it_is():
    shot = a_result(task="voc07", protocol="lowshot", settings={"k": 4}, details={"interval": "lowest and highest sample"})
    table = scoreboard.score_table([shot, a_result()])
    assert table.interval.tolist() == ["lowest and highest sample", scoreboard.BOOTSTRAP]
    shown = scoreboard.readable(table).set_index("task")["here, %"]
    assert shown["voc07_lowshot"] == "50.0 (40.0 to 60.0, lowest and highest sample)" and shown["toy_scenes"] == "50.0 (40.0 to 60.0)"
    assert [ax.get_xlabel().splitlines()[1] for ax in scoreboard.draw_scoreboard(table).axes] == ["bars: lowest and highest sample", f"bars: {scoreboard.BOOTSTRAP}"]


def test_a_part_of_the_test_images_is_called_a_part():
    shown = scoreboard.readable(scoreboard.score_table([a_result(task="dtd"), a_result(task="dtd", n=1880, model="all"), a_result(task="toy_people", protocol="labels", n=7)]))
    assert dict(zip(shown.model + shown.task, shown["test images"])) == {"mdtd": "100 of 1,880", "alldtd": "1,880", "mtoy_people": "7"}


# ── results of other protocols ───────────────────────────────────────────────────────────────────────────────────────────────

def test_protocols_with_their_metrics_and_a_chance_that_nobody_knows():
    results = [a_result(protocol="lowshot", settings={"k": k}, metric="mAP", task="dtd") for k in (1, 96)]
    results += [a_result(protocol="finetune", settings={"epochs": 3}), a_result(protocol="robustness", settings={}), a_result(protocol="detection", metric="box AP", settings={}, chance=None)]
    table = scoreboard.score_table(results)
    assert table.protocol.tolist() == ["lowshot k=1", "lowshot k=96", "finetune", "robustness", "detection"]
    assert table.metric.tolist() == ["mAP", "mAP", "top-1", "top-1", "box AP"] and scoreboard.readable(table)["chance, %"].tolist().count("–") == 1
    scoreboard.draw_scaling(table, scoreboard.published_table(), ["toy_scenes", "dtd"])


def test_no_results_are_an_error_and_leave_no_folder(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="no results"):
        scoreboard.run_scoreboard(scoreboard.ScoreboardConfig(run_dir=str(tmp_path / "out"), results=f"{tmp_path}/*.jsonl"))
    assert not (tmp_path / "out").exists()


def test_a_run_measures_real_tasks(tmp_path, monkeypatch):
    "Two probes on a folder of pictures, the size it is told, once."
    from seer_nb.evaluate.readers import Listing
    labels, images = np.arange(240) % 3, torch.randint(256, (240, 3, 24, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(tasks.READERS, "dtd", lambda folder, split: Listing(("a", "b", "c"), labels, images.__getitem__, [str(i) for i in range(240)]))
    config = scoreboard.ScoreboardConfig(run_dir=str(tmp_path / "out"), tasks="dtd dtd", root=str(tmp_path), image_size=32, device="cpu", protocols="knn", test_images=60)
    table = scoreboard.run_scoreboard(config)
    assert table.task.tolist() == ["dtd", "dtd"] and table.protocol.tolist() == ["knn k=20", "knn k=200"] and set(table.n) == {60} and set(table.kind) == {"real"}
    assert json.loads(table.settings[0])["image_size"] == 32 and table.paper.isna().all()
    monkeypatch.setattr(scoreboard, "evaluate_backbone", None)             # a second measurement would fail
    assert scoreboard.run_scoreboard(config).equals(table)


@pytest.mark.parametrize("bad, message", [({"tasks": "copydays"}, "not copydays"), ({"tasks": "voc07"}, "not voc07"), ({"tasks": "toy_people"}, "not toy_people"), ({"protocols": "svm"}, "not 'svm'"),
                                          ({"protocols": " "}, "protocols is empty"), ({"tasks": "dtd"}, "dtd is not there"), ({"train_images": 100}, "k = 200 needs"), ({"tasks": "dt"}, "did you mean")])
def test_what_the_board_does_not_measure(bad, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message): scoreboard.run_scoreboard(scoreboard.ScoreboardConfig(run_dir=str(tmp_path / "out"), root=str(tmp_path), **bad))
    assert not (tmp_path / "out").exists()


def test_a_run_exports_all_formats(tmp_path):
    for seed, model in enumerate(("<b>m</b>|x", "plain")): append_result(tmp_path / "in" / "results.jsonl", a_result(model=model, seed=seed))
    table = scoreboard.run_scoreboard(scoreboard.ScoreboardConfig(run_dir=str(tmp_path / "out"), results=f"{tmp_path}/in/*.jsonl"))
    read = pd.read_csv(tmp_path / "out" / "scoreboard.csv")
    assert read.model.tolist() == table.model.tolist() and read.here.tolist() == table.here.tolist()
    text = (tmp_path / "out" / "scoreboard.md").read_text()
    lines = text.splitlines()
    assert len(lines) == 2 + 2 and len({line.replace("\\|", "").count("|") for line in lines}) == 1 and "&lt;b>m" in text
    page = (tmp_path / "out" / "scoreboard.html").read_text()
    assert "<b>m" not in page and "&lt;b&gt;m" in page
    measured, published, missing = page.split("<table")[1:]
    assert measured.count("<tr") == 1 + 2 and "here, %" in measured and "here, %" not in published + missing and "43.9 top-1 error %" in published
    state = pd.read_csv(tmp_path / "out" / "coverage.csv")
    assert state[(state.task == "toy_scenes") & (state.protocol == "knn")].state.tolist() == ["measured here"]


def test_a_suite_may_be_moved(tmp_path, monkeypatch):
    def draw(folder, **changes): return scoreboard.run_scoreboard(scoreboard.ScoreboardConfig(**{"run_dir": str(folder), "suite": str(folder), "paper_model": "auto", **changes}))
    append_result(tmp_path / "old/dtd/results.jsonl", a_result())
    (tmp_path / "old/dtd/job.json").write_text("{}")
    table = draw(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert draw(tmp_path / "new").equals(table)
    with pytest.raises(ValueError, match="paper_model was"): draw(tmp_path / "new", paper_model="SEER 10B")
    monkeypatch.setattr(scoreboard, "measure", lambda config, jobs, path: [a_result()])
    with pytest.raises(ValueError, match="suite was"): draw(tmp_path / "new", suite="")
    draw(tmp_path / "out", suite="")
    with pytest.raises(ValueError, match="suite was"): draw(tmp_path / "out", suite=str(tmp_path / "new"))      # would replace what was measured there
