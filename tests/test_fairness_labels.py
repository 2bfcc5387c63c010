"Label association: rules by hand, lists in the published formats, classifiers with a known bias, and runs."
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import scipy.special
import torch
from PIL import Image

from seer_nb.evaluate import fairness_labels as fl
from seer_nb.evaluate.groups import PLANTED, group_rates, join_groups, toy_people
from seer_nb.evaluate.robustness import save_probe
from seer_nb.evaluate.tasks import open_model, read_results


def test_top_predictions_are_scipys_softmax():
    logits = np.random.default_rng(0).normal(size=(30, 9)) * 4
    predictions, confidences = fl.top_predictions(logits)
    p = scipy.special.softmax(logits, axis=1)
    assert (predictions == np.argsort(-p, 1)[:, :5]).all() and np.allclose(confidences, -np.sort(-p, 1)[:, :5])
    assert fl.top_predictions(np.zeros((2, 7)), 3)[0].tolist() == [[0, 1, 2]] * 2
    for bad in (np.full((2, 7), np.nan), np.zeros((2, 4)), np.zeros(7)):
        with pytest.raises(ValueError): fl.top_predictions(bad)


def test_rates_are_those_of_pandas():
    rng = np.random.default_rng(1)
    logits, groups = 3 * rng.normal(size=(500, 20)), rng.choice(["f × d", "m × l", ""], 500)
    predictions, confidences = fl.top_predictions(logits)
    families = {"Human": [3], "Non-Human": [0, 7, 11, 19]}
    table = fl.label_association_rates(predictions, confidences, families, groups, n_resamples=50)
    assert list(table) == [0, 0.1, 0.3, 0.8]
    p = pd.DataFrame(scipy.special.softmax(logits, axis=1))
    top = p.rank(axis=1, ascending=False) <= 5
    for t, by_family in table.items():
        for family, rates in by_family.items():
            expected = ((p >= t) & top)[families[family]].any(axis=1).groupby(groups).mean()
            for r in rates: assert r.value == pytest.approx(expected[r.group.replace("unknown", "")]) and r.n == (groups == r.group.replace("unknown", "")).sum()
    assert [r.value for r in table[0.0]["Human"]] >= [r.value for r in table[0.8]["Human"]]


def test_labels_may_be_words():
    said, sure = np.array([["ape", "face"], ["face", "ape"]]), np.array([[0.5, 0.4], [0.9, 0.1]])
    assert fl.family_fires(said, sure, ["ape"], 0.3, 2).tolist() == [True, False]
    assert fl.family_fires(said, sure, ["ape"], 0.1, 2).tolist() == [True, True]            # at least, not above
    assert fl.family_fires(said, sure, ["ape"], 0.0, 1).tolist() == [True, False]


@pytest.mark.parametrize("said, sure", [([[1, 2]], [[0.2, 0.5]]), ([[1, 2]], [[1.2, 0.5]]), ([[1, 2]], [[0.5]]), ([[1, 2]], [[np.nan, 0.1]]), ([1, 2], [0.5, 0.5])])
def test_answers_that_cannot_be(said, sure):
    with pytest.raises(ValueError): fl.family_fires(said, sure, [1], 0.1, 2)


def test_the_published_families():
    cc, miap = fl.paper_families("casual_conversations"), fl.paper_families("miap")
    count = lambda mapping: {family: list(mapping.values()).count(family) for family in mapping.values()}
    assert count(cc) == {"Human": 2, "Possibly-Human": 3, "Non-Human": 18, "Crime": 1}
    assert count(miap) == {"Human": 2, "Possibly-Human": 3, "Non-Human": 17, "Possibly-Non-Human": 2, "Crime": 1}


def test_any_taxonomy(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"2": "Mountain_Gorilla", "0": ["face", "human face"], "1": "sofa"}))
    (tmp_path / "families.json").write_text(json.dumps({"human face": "Human", "mountain gorilla": "Non-Human"}))
    labels, mapping = fl.read_labels(tmp_path / "labels.json"), fl.read_mapping(tmp_path / "families.json")
    assert fl.label_families(labels, mapping, strict=True) == {"Human": [0], "Non-Human": [2]}
    with pytest.raises(ValueError, match="did you mean 'human face'"): fl.label_families(labels, {"human fase": "Human"}, strict=True)
    for name, text in {"gap.json": '{"0": "a", "2": "b"}', "none.json": "[]", "word.json": '"a"', "broken.json": "[", "names.json": '{"a": "b"}'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name): fl.read_labels(tmp_path / name)
    with pytest.raises(ValueError): fl.read_mapping(tmp_path / "gap.json" if False else tmp_path / "none.json")


def test_vissls_own_taxonomy(tmp_path):
    "imagenet_to_idx_labels_map.json is {class: output}; the first name of each class, if the file of names lies beside it, is what families are compared with."
    path = tmp_path / "imagenet_to_idx_labels_map.json"
    path.write_text(json.dumps({"c": 2, "1k_a": 0, "b": 1}))
    assert fl.read_labels(path) == ("1k_a", "b", "c")
    (tmp_path / fl.LABEL_NAMES).write_text(json.dumps({"b": ["people"], "c": ["great ape", "pongid"], "1k_a": ["face", "human face"], "d": ["sofa"]}))
    assert fl.read_labels(path) == ("face", "people", "great ape")
    assert fl.label_families(fl.read_labels(path), fl.paper_families("miap")) == {"Human": [0, 1], "Non-Human": [2]}
    (tmp_path / "other.json").write_text('["b", "c"]')
    assert fl.read_labels(tmp_path / "other.json") == ("b", "c")                                     # a list is not a list of classes
    for text in ('{"a": 0, "b": 2}', '{"a": 0, "b": 0}', "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="imagenet_to_idx"): fl.read_labels(path)
    path.write_text('{"e": 0}')
    for names in ('{"b": ["people"]}', '{"e": []}', '{"e": "people"}', "[]"):
        (tmp_path / fl.LABEL_NAMES).write_text(names)
        with pytest.raises(ValueError, match=fl.LABEL_NAMES): fl.read_labels(path)


def test_a_text_of_labels_is_checked_as_json_is(tmp_path, monkeypatch):
    "The error names the file: too large, in another encoding, or not there."
    path = tmp_path / "labels.txt"
    path.write_bytes("Gänsegeier\n".encode("latin-1"))
    with pytest.raises(ValueError, match="labels.txt: .*utf-8"): fl.read_labels(path)
    path.write_text("face\nape\n", encoding="utf-8")
    assert fl.read_labels(path) == ("face", "ape")
    monkeypatch.setattr(fl, "SMALL", 8)
    with pytest.raises(ValueError, match="labels.txt: it has more than 8 bytes"): fl.read_labels(path)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"): fl.read_labels(tmp_path / "nowhere.txt")


def test_what_is_shown_beside_is_part_of_a_result():
    "The details hold the published rates of `paper_model`: with another one it is another result."
    people = toy_people(4)
    settings = [fl.label_settings(fl.LabelsConfig(paper_model=name), ["ape"], {"ape": "Non-Human"}, "w", people, (fl.as_task(people, "toy_people"),)) for name in ("", "SEER 10B")]
    assert [s.pop("paper_model") for s in settings] == ["", "SEER 10B"] and settings[0] == settings[1]


def test_silence_is_not_fairness(tmp_path):
    "A taxonomy without a family leaves it out, and a headline without a label is an error."
    assert "Human" not in fl.label_families(["chimpanzee", "prison"], fl.paper_families("miap"))
    labels = tmp_path / "labels.txt"
    labels.write_text("cloud\nsea\npeople\nprison\nsand\nwall\n")
    with pytest.raises(ValueError, match="no label of the family Non-Human"): fl.run_labels(fl.LabelsConfig(run_dir=str(tmp_path / "r"), archive="toy:fair", labels=str(labels)))
    assert not (tmp_path / "r").exists()


BOX = {"path": "p.png", "bbox": [10, 20, 130, 320], "IsGroupOf": 0, "IsDepictionOf": "0", "IsInsideOf": 1, "IsOccluded": 1, "LabelName": "/m/01g317", "Confidence": 1,
       "GenderPresentation": "Predominantly Feminine", "AgePresentation": "Older"}


def write_miap(root, rows):
    root.mkdir(exist_ok=True)
    x, y = np.meshgrid(np.arange(400) % 256, np.arange(340) % 256)
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(root / "p.png")
    (root / "miap.json").write_text(json.dumps(rows))
    return root


def test_miap(tmp_path):
    rows = [BOX | {"IsGroupOf": False}, BOX | {"IsGroupOf": True}, BOX | {"IsDepictionOf": -1}, BOX | {"IsGroupOf": None}, BOX | {"bbox": [0, 0, 99, 200]}, BOX | {"bbox": [20, 10, 320, 130], "GenderPresentation": "Unknown"},
            BOX | {"bbox": [-30, 0, 100, 110], "AgePresentation": "Young"}]
    people, counts = fl.read_miap(write_miap(tmp_path, rows))
    assert counts == {"a group": 1, "kept": 3, "not said whether a depiction": 1, "not said whether a group": 1, "smaller than 100 pixels": 1}
    assert people.attributes == {"gender presentation": ["feminine", None, "feminine"], "age presentation": ["older", "older", "young"], "picture": ["p.png"] * 3}
    corners = [people.read(i)[:2, 0, 0].tolist() + list(people.read(i).shape[1:]) for i in range(3)]
    assert corners == [[10, 20, 120, 120], [110, 10, 120, 120], [0, 0, 110, 100]]       # top of a tall box; middle of a wide one; what the picture has of one that leaves it
    assert fl.read_miap(tmp_path, "text")[0].read(1)[:2, 0, 0].tolist() == [20, 10]


@pytest.mark.parametrize("row, why", [
    (BOX | {"path": "../p.png"}, "leads out"), (BOX | {"bbox": [1, 2, 3]}, "needs path and bbox"), (BOX | {"bbox": [130, 20, 10, 320]}, "no box"), (BOX | {"bbox": [0, 0, "a", 9]}, "could not convert"),
    (BOX | {"bbox": [0, 0, 1e999, 200]}, "no box"), ({"bbox": [0, 0, 200, 200]}, "needs path"), (BOX | {"IsGroupOf": 1}, "no box counts"), (BOX | {"GenderPresentation": [1]}, "no attribute")])
def test_hostile_boxes(tmp_path, row, why):
    with pytest.raises(ValueError, match=why): fl.read_miap(write_miap(tmp_path, [row]))


def test_boxes_of_pictures_that_are_not_there(tmp_path):
    people, counts = fl.read_miap(write_miap(tmp_path, [BOX, BOX | {"path": "gone.png"}, BOX | {"path": "gone.png", "IsGroupOf": 1}]))
    assert counts == {"kept": 1, "no image file": 2} and people.names == ("p.png",)
    with pytest.raises(ValueError, match="no box counts: {'no image file': 1}"): fl.read_miap(write_miap(tmp_path, [BOX | {"path": "gone.png"}]))


def test_a_box_outside_of_its_picture(tmp_path):
    people, _ = fl.read_miap(write_miap(tmp_path, [BOX | {"bbox": [500, 0, 700, 200]}]))
    with pytest.raises(ValueError, match="outside a picture of 400 x 340"): people.read(0)


@pytest.mark.parametrize("task", ["casual_conversations", "miap"])
def test_missing_data_say_where_to_get_them(tmp_path, task):
    with pytest.raises(FileNotFoundError, match="where to get it"): fl.open_people(task, tmp_path)


def test_a_part_is_a_draw(tmp_path):
    rows = [{"img_path": "p.png", "subject_id": i, "age": i, "gender": "Female", "skin-type": 1} for i in range(40)]
    (tmp_path / "casual_conversations").mkdir()
    write_miap(tmp_path / "casual_conversations", [])
    (tmp_path / "casual_conversations/miap.json").write_text(json.dumps(rows))
    people, _ = fl.open_people("casual_conversations", tmp_path, n=10, seed=1)
    ages = people.attributes["age"]
    assert len(people.names) == len(ages) == 10 and ages != list(range(10)) and max(ages) > 15 and ages == sorted(ages) and people.read(9).shape == (3, 340, 400)
    assert fl.open_people("casual_conversations", tmp_path, n=10, seed=2)[0].attributes["age"] != ages
    assert len(fl.open_people("casual_conversations", tmp_path, n=99)[0].names) == 40


def test_published_rates():
    seer = {(r["family"], r["group"]): r["value"] for r in fl.published_label_rates("SEER RG-10B")}
    assert seer["Human", "male × lighter"] == pytest.approx(0.79) and seer["Non-Human", "70+"] == 0 and len(seer) == 32
    assert {r["source"] for r in fl.published_label_rates("SEER 10B")} == {"figure SEER_Visual03b.jpg (printed labels)"} and len(fl.published_label_rates("SEER 10B")) == 4
    with pytest.raises(ValueError, match="did you mean 'SEER 10B'"): fl.published_label_rates("SEER10B")
    assert not fl.published_label_rates(task="miap")


class ByBrightness(torch.nn.Module):
    "Calls dark pictures animals; or everybody people, if it does not look."

    def __init__(self, looks): super().__init__(); self.looks = looks

    def forward(self, images):
        dark = (images.mean((1, 2, 3)) < -1).float() * self.looks
        return 9 * torch.stack([dark, 1 - dark] + [0 * dark - 1] * 4, 1)


@pytest.mark.parametrize("looks", [1.0, 0.0])
def test_a_known_bias_is_measured(looks):
    "The estimated gap holds the planted one, for a classifier with the bias and one without."
    from seer_nb.evaluate.features import extract_features
    people = toy_people(300, 5, 0.4)
    answers = fl.top_predictions(extract_features(ByBrightness(looks), [people.read(i) for i in range(300)]))
    details = fl.score_labels(*answers, {"Non-Human": [0], "Human": [1]}, people, fl.LabelsConfig(min_size=20))
    gap, groups = details["gap"], join_groups(people.attributes["gender"], people.attributes["skin tone"])
    assert gap["low"] <= 0.4 * looks <= gap["high"]
    if looks: assert gap["highest"] == PLANTED and abs(gap["difference"] - 0.4) < 0.02 and gap["p_value"] < 0.01
    else: assert gap["difference"] == 0 and gap["p_value"] == 1
    human = [r for r in details["all_rates"] if r["family"] == "Human" and r["threshold"] == 0.8 and r["grouping"] == "gender × skin tone"]
    assert {r["group"]: r["value"] for r in human}[PLANTED] == pytest.approx(1 - 0.4 * looks, abs=0.02)
    assert [r["value"] for r in details["rates"]] == [r.value for r in group_rates(fl.family_fires(*answers, [0], 0.1), groups, clusters=people.attributes["subject_id"])]
    assert json.loads(json.dumps(details)) == details


def test_runs_in_the_published_formats(tmp_path, monkeypatch):
    "MIAP with a probe on an untrained backbone, its own labels and mapping; called again, returned; then drawn from the line alone."
    root = tmp_path / "data"
    (root).mkdir()
    write_miap(root / "miap", [BOX | {"bbox": [10 * i, 5, 10 * i + 150, 170], "GenderPresentation": ["Predominantly Feminine", "Predominantly Masculine", "Unknown"][i % 3]} for i in range(12)])
    backbone = open_model("random:regnety_toy")
    save_probe(tmp_path / "probe.safetensors", torch.nn.Linear(352, 7), backbone)
    (tmp_path / "labels.txt").write_text("face\nprison\ncat\nape\nsofa\nsea\nsky\n")
    config = fl.LabelsConfig(run_dir=str(tmp_path / "run"), task="miap", root=str(root), probe=str(tmp_path / "probe.safetensors"), labels=str(tmp_path / "labels.txt"), image_size=32, min_size=3)
    result = fl.run_labels(config)
    assert result.n == 12 and result.metric == "labelled non-human" and result.chance == pytest.approx(5 / 7) and result.details["boxes"] == {"kept": 12}
    assert result.details["families"] == {"Human": ["face"], "Non-Human": ["ape"], "Possibly-Non-Human": ["cat"], "Crime": ["prison"]} and result.details["silent"] == ["Possibly-Human"]
    assert {r["group"] for r in result.details["rates"]} == {"feminine", "masculine", "unknown"} and [r["few"] for r in result.details["rates"]] == [True] * 3    # one picture is one cluster
    assert fl.run_labels(config) == result == read_results(tmp_path / "run/results.jsonl")[0]
    looked = []
    monkeypatch.setattr(fl, "extract_features", lambda model, images, extract=fl.extract_features, **how: looked.append(len(images)) or extract(model, images, **how))
    with pytest.raises(ValueError, match="other parameters"): fl.run_labels(dataclasses.replace(config, family="Human"))
    assert set(looked) <= {1}                                        # refused before the pictures are read, but for one
    human = fl.run_labels(dataclasses.replace(config, run_dir=str(tmp_path / "human"), family="Human"))
    assert human.metric == "labelled human" and human.value == np.mean(fl.family_fires(np.load(tmp_path / "human/predictions.npy"), np.load(tmp_path / "human/confidences.npy"), [0], 0.1))
    (tmp_path / "human/results.jsonl").unlink()                      # stopped half-way, and gone on with smaller batches
    assert fl.run_labels(dataclasses.replace(config, run_dir=str(tmp_path / "human"), family="Human", extract_batch=5)).value == human.value
    assert np.load(tmp_path / "run/predictions.npy").shape == (12, 5)
    assert [ax.get_title() for ax in fl.draw_labels(result.details).axes] == list(result.details["families"])
    (tmp_path / "labels.txt").write_text("face\nape\nsofa\nsea\nsky\n")
    looked.clear()
    with pytest.raises(ValueError, match="7 outputs, but 5 labels"): fl.run_labels(dataclasses.replace(config, run_dir=str(tmp_path / "other")))
    assert looked == [1] and not (tmp_path / "other").exists()


def test_a_probe_is_trained_on_a_folder_per_label(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("ape", "people"):
        (tmp_path / "archive" / label).mkdir(parents=True)
        for i in range(6): Image.fromarray(rng.integers(0, 60 if label == "ape" else 255, (48, 48, 3), dtype=np.uint8)).save(tmp_path / "archive" / label / f"{i}.png")
    config = fl.LabelsConfig(run_dir=str(tmp_path / "run"), archive=str(tmp_path / "archive"), top_k=2, test_images=40, min_size=5)
    result = fl.run_labels(config)
    assert result.details["families"] == {"Human": ["people"], "Non-Human": ["ape"]} and json.loads((tmp_path / "run/labels.json").read_text()) == ["ape", "people"]
    with pytest.raises(ValueError, match="no folders of images"): fl.run_labels(dataclasses.replace(config, run_dir=str(tmp_path / "x"), archive=str(tmp_path / "archive/ape")))


HEAD = "ImageID,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepictionOf,IsInsideOf,GenderPresentation,AgePresentation\n"


def test_the_official_list_of_miap(tmp_path):
    Image.fromarray(np.zeros((340, 400, 3), np.uint8)).save(tmp_path / "0a1b.jpg")
    (tmp_path / "boxes.csv").write_text(HEAD + "0a1b,/m/01g317,1,0.1,0.6,0.0,1.0,0,0,0,0,0,Predominantly Masculine,Unknown\n0a1b,/m/01g317,1,0.1,0.3,0.0,1.0,0,0,0,0,0,Unknown,Young\n")
    with open(tmp_path / "boxes.csv", "a") as file: file.write("77ff,/m/01g317,1,0.1,0.6,0.0,1.0,0,0,0,0,0,Unknown,Young\n")       # a picture that is not there
    people, counts = fl.read_miap(tmp_path)
    assert counts == {"kept": 1, "no image file": 1, "smaller than 100 pixels": 1} and people.attributes == {"gender presentation": ["masculine"], "age presentation": [None], "picture": ["0a1b.jpg"]}
    assert people.read(0).shape == (3, 200, 200)
    (tmp_path / "miap_boxes_train.csv").write_text(HEAD)
    with pytest.raises(ValueError, match="2 lists, boxes.csv, miap_boxes_train.csv"): fl.read_miap(tmp_path)
    (tmp_path / "boxes.csv").rename(tmp_path / "miap_boxes_test.csv")
    assert fl.read_miap(tmp_path)[1] == counts                      # the test list, beside that for training
    (tmp_path / "miap_boxes_train.csv").unlink()
    (tmp_path / "miap_boxes_test.csv").rename(tmp_path / "boxes.csv")
    for line in ("../0a1b,,1,0.1,0.6,0,1,0,0,0,0,0,,\n", "0a1b,,1,a,0.6,0,1,0,0,0,0,0,,\n", "0a1b\n"):
        (tmp_path / "boxes.csv").write_text(HEAD + line)
        with pytest.raises(ValueError, match="boxes.csv"): fl.read_miap(tmp_path)
