"""The audit: parts that fail do not take others with them, the card holds in one file what was measured, and text from outside stays text."""
import dataclasses
import html.parser
import math
import re

import pytest

from seer_nb.evaluate import audit
from seer_nb.evaluate.audit import AuditConfig, Part, holm, as_text, markdown_table, run_audit
from seer_nb.evaluate.tasks import Result, read_results

HOSTILE = 'a|b <img src=x onerror=alert(1)> [x](javascript:alert(1)) ![y](http://evil/z.png) `c` **d** &lt;e&gt;\n# f\x00'


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    run_dir: str = ""
    task: str = "toy_scenes"
    seed: int = 0
    model: str = ""
    root: str = ""
    image_size: int = 0
    extract_batch: int = 0
    device: str = ""


def fake_result(config, **details):
    return Result(config.task, config.model, "fake", {"a": 1}, "top-1", 0.5, 0.4, 0.6, 10, 0.1, 0.1, None, "", config.seed, details)


def rates(*names): return [dict(group=name, n=9, value=0.5, low=0.2, high=0.8, few=name == "b") for name in names]


def gap(p): return dict(highest="a", lowest="b", difference=0.2, low=0.1, high=0.3, p_value=p)


@pytest.fixture
def parts(monkeypatch):
    "An audit of four parts that take no time; `calls` counts them."
    calls = []

    def part(name, section, run):
        def counted(config):
            calls.append(name)
            return run(config)
        return Part(name, section, f"question of {name}?", "toy_scenes", counted, FakeConfig)

    def broken(config): raise RuntimeError("out of memory\nand a long story")
    def worse(config): assert False, "what nobody foresaw"
    monkeypatch.setattr(audit, "AUDIT", (
        part("toy_one", "fairness", lambda c: fake_result(c, rates=rates("a"), gap=gap(0.02), silent=["Crime"], families={"Human": ["face"]}, left_out={"no gender": 3},
                                                          groups={"by": {"rates": rates("a", "b", HOSTILE), "gap": gap(0.02)}})),
        part("toy_two", "fairness", lambda c: dataclasses.replace(fake_result(c, groups={"by": {"rates": rates("a", "b"), "gap": gap(0.04)}}), protocol="fake 2")),
        part("toy_three", "robustness", broken), part("toy_five", "robustness", worse),
        part("toy_four", "copies", lambda c: dataclasses.replace(fake_result(c, splits={"strong": {"mAP": 0.25, "low": 0.1, "high": 0.4, "n": 3}}), protocol="fake 3"))))
    return calls


def test_a_part_that_fails_is_reported_and_tried_again(parts, tmp_path):
    config = AuditConfig(run_dir=str(tmp_path / "a"))
    assert len(run_audit(config)) == 3
    card = (tmp_path / "a/card.md").read_text()
    assert "| toy\\_three | toy\\_scenes | out of memory |" in card and "long story" not in card
    assert "| toy\\_five | toy\\_scenes | AssertionError: what nobody foresaw |" in card
    assert len(run_audit(config)) == 3 and parts.count("toy_three") == 2
    assert len(read_results(tmp_path / "a/results.jsonl")) == 3                                     # each once


def test_p_values_are_corrected_for_all_gaps_of_the_card(parts, tmp_path):
    run_audit(AuditConfig(run_dir=str(tmp_path)))
    rows = [line for line in (tmp_path / "card.md").read_text().splitlines() if line.startswith(("| toy\\_one | by", "| toy\\_two | by"))]
    assert [row.split(" | ")[-3:] for row in rows] == [["0.020", "0.040", "a gap |"], ["0.040", "0.040", "a gap |"]]


def test_what_a_score_rests_on_stands_in_the_card(parts, tmp_path):
    run_audit(AuditConfig(run_dir=str(tmp_path), parts="toy_one"))
    card = (tmp_path / "card.md").read_text()
    assert "Labels counted as Human: face." in card and "Left out: no gender: 3." in card
    assert "| toy\\_one | toy\\_scenes | no label of the family Crime among the model's labels |" in card


def test_a_smaller_batch_and_another_part_may_go_on_in_the_folder(parts, tmp_path):
    run_audit(AuditConfig(run_dir=str(tmp_path), parts="toy_one"))
    assert len(run_audit(AuditConfig(run_dir=str(tmp_path), parts="toy_one toy_two", extract_batch=64, device="cpu"))) == 2


def test_toy_parts_can_be_named_beside_a_root(parts, tmp_path):
    assert len(run_audit(AuditConfig(run_dir=str(tmp_path / "a"), parts="toy_two", root=str(tmp_path)))) == 1


def test_small_groups_are_marked_not_dropped(parts, tmp_path):
    run_audit(AuditConfig(run_dir=str(tmp_path), parts="toy_two"))
    card = (tmp_path / "card.md").read_text()
    assert "| b | 9 | 50.0 (20.0 to 80.0) | few: do not rely on it |" in card and "| a | 9 | 50.0 (20.0 to 80.0) |  |" in card


def test_a_missing_interval_is_a_dash(parts, tmp_path, monkeypatch):
    "Neither nan, nor None, nor half an interval is printed."
    nan = float("nan")
    sick = dict(rates=[dict(group="a", n=1, value=nan, low=nan, high=nan, few=True), dict(group="b", n=1, value=0.5, low=nan, high=0.9, few=True)], gap=gap(0.02) | {"low": nan, "high": nan},
                splits={"strong": {"mAP": nan, "low": nan, "high": nan, "n": 0}}, corrupted={"fog": [0.5]}, left_out={"no gender": 3})
    run = lambda c: dataclasses.replace(fake_result(c, **sick), value=nan, ci_low=nan, ci_high=nan, chance=None)
    monkeypatch.setattr(audit, "AUDIT", (Part("toy_sick", "fairness", "?", "toy_scenes", run, FakeConfig),))
    monkeypatch.setattr(audit, "append_result", lambda *_: None)
    run_audit(AuditConfig(run_dir=str(tmp_path)))
    card = (tmp_path / "card.md").read_text()
    assert not re.search(r"\bnan\b|NaN|None|– to|to –", card)
    assert "| strong | – | – | 0 |" in card and "| fog | 50.0 | – | 10 |" in card and "| b | 1 | 50.0 (–) |" in card and "| 20.0 | – | 0.020 |" in card
    assert "| fake |" not in card and "| top-1 | – | – | higher | – | – | 10 |" in card


def test_gaps_at_equal_chance_are_explained_beside_the_table(parts, tmp_path, monkeypatch):
    "Page 62 compares precisions at equal chance: whoever reads only the card must learn it, and for no other part."
    part = lambda name, g: Part(name, "fairness", "?", "toy_scenes", lambda c: dataclasses.replace(fake_result(c, groups={"gender": {"rates": rates("a", "b"), "gap": g}}), protocol=name), FakeConfig)
    monkeypatch.setattr(audit, "AUDIT", (part("toy_x", gap(0.02)), part("toy_faces", gap(0.0001) | {"compared": "at equal chance"})))
    run_audit(AuditConfig(run_dir=str(tmp_path / "both")))
    card = (tmp_path / "both/card.md").read_text()
    assert "| toy\\_faces | gender · at equal chance | a | b | 20.0 | 10.0 to 30.0 | \\< 0.001 | \\< 0.001 | a gap |" in card and "| toy\\_x | gender | a |" in card
    assert card.index("| toy\\_faces | gender · at") < card.index("Gaps **at equal chance** (toy\\_faces) are not") < card.index("## Fairness")
    run_audit(AuditConfig(run_dir=str(tmp_path / "one"), parts="toy_x"))
    assert "equal chance" not in (tmp_path / "one/card.md").read_text()


def test_the_card_needs_no_other_file(parts, tmp_path):
    run_audit(AuditConfig(run_dir=str(tmp_path)))
    page = (tmp_path / "card.html").read_text()
    assert re.findall(r'src="(?!data:image/png;base64,)', page) == [] and "href=" not in page
    assert page.count("data:image/png;base64,") == len(list(tmp_path.glob("*.png"))) == 3


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

    def handle_data(self, data): self.text.append(data)


def test_names_from_outside_stay_text(parts, tmp_path):
    run_audit(AuditConfig(run_dir=str(tmp_path), parts="toy_one"))
    tags = Tags()
    tags.feed((tmp_path / "card.html").read_text())
    assert {tag for tag, _ in tags.tags} <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "strong", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "img"}
    assert all(attrs.get("src", "data:").startswith("data:") and not any(name.startswith("on") for name in attrs) for _, attrs in tags.tags)
    assert sum("<img src=x onerror=alert(1)>" in text for text in tags.text) + "".join(tags.text).count("javascript:alert(1)") >= 1
    assert "&lt;e&gt;" in "".join(tags.text)                                                         # not decoded twice


def test_plain_text_is_one_cell():
    assert len(markdown_table(["x"], [[HOSTILE]]).splitlines()) == 3
    assert as_text(0.123456) == "0.1235" and as_text("a_b|c") == r"a\_b\|c" and "\x00" not in as_text(HOSTILE)


def test_unknown_parts_and_models_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="no part 'toy_peopl'.*toy_people"): run_audit(AuditConfig(run_dir=str(tmp_path / "a"), parts="toy_peopl"))
    with pytest.raises(ValueError): run_audit(AuditConfig(run_dir=str(tmp_path / "a"), model="timmm:x"))
    assert not (tmp_path / "a").exists()


def test_missing_data_is_said_with_its_source(tmp_path):
    results = run_audit(AuditConfig(run_dir=str(tmp_path / "a"), root=str(tmp_path / "data")))
    card = (tmp_path / "a/card.md").read_text()
    assert results == [] and "Nothing was measured." in card and "No groups were compared." in card
    assert all(f"| {as_text(part.name)} | {as_text(part.task)} | no data: " in card for part in audit.AUDIT if not part.name.startswith("toy_"))


def test_holm_follows_statsmodels_rule():
    "Worked by hand: sorted p times 4, 3, 2, 1, never falling, at most 1."
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_missing_p_value_silences_no_other():
    nan = float("nan")
    for p_values in ([nan, 0.001, 0.002], [None, 0.001, 0.002], [0.001, nan, 0.002, None]):
        corrected = holm(p_values)
        assert [math.isnan(p) for p in corrected] == [p is None or p != p for p in p_values]
        assert [p for p in corrected if p == p] == pytest.approx([0.002, 0.002])
    assert all(map(math.isnan, holm([nan, None])))


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_gap_without_a_p_value_is_not_tested(parts, tmp_path, monkeypatch, missing):
    run = lambda c: fake_result(c, groups={"age": {"rates": rates("a", "b"), "gap": gap(missing)}, "gender": {"rates": rates("a", "b"), "gap": gap(0.02)}})
    monkeypatch.setattr(audit, "AUDIT", (Part("toy_x", "fairness", "?", "toy_scenes", run, FakeConfig),))
    run_audit(AuditConfig(run_dir=str(tmp_path)))
    rows = {row.split(" | ")[1]: row.split(" | ")[-3:] for row in (tmp_path / "card.md").read_text().splitlines() if row.startswith("| toy\\_x | ") and row.count("|") == 10}
    assert rows == {"age": ["–", "–", "not tested |"], "gender": ["0.020", "0.020", "a gap |"]}


def test_a_card_holds_no_folder_of_this_machine_and_no_name_of_a_picture(tmp_path, monkeypatch):
    root = tmp_path / "anna" / "sets"
    root.mkdir(parents=True)
    face = "39_1_20170116174525125.jpg.chip.jpg"

    def fails(config): raise ValueError(f"{root}/utk_faces/part1/{face}: it is damaged, as is {tmp_path}/anna/other/list.json")
    def tells(config):
        settings = {"archive": f"{root}/archive", "probe": f"{tmp_path}/anna/probe.safetensors", "train_folder": "train", "labels": 619}
        return dataclasses.replace(fake_result(config, left_out={"malformed names": [f"part1/{face}"], "the same face again": 4}), settings=settings)
    monkeypatch.setattr(audit, "AUDIT", (Part("toy_a", "fairness", "?", "toy_scenes", tells, FakeConfig), Part("toy_b", "fairness", "?", "toy_scenes", fails, FakeConfig)))
    monkeypatch.setattr(audit, "open_model", lambda spec, seed, opened=audit.open_model: opened("random:regnety_toy", seed=seed))
    folder = tmp_path / "anna" / "run"
    run_audit(AuditConfig(run_dir=str(folder), model=f"seer:{root}/seer_128gf.pt", root=str(root), parts="toy_a toy_b", labels=f"{root}/labels.json", families=f"{root}/families.json"))
    for card in ((folder / "card.md").read_text(), (folder / "card.html").read_text()):
        assert str(tmp_path) not in card and "anna" not in card and "2017011617" not in card
        assert "seer:seer" in card and "Toy audit" not in card
    text = (folder / "card.md").read_text()
    assert '"root": "sets"' in text and '"archive": "archive"' in text and '"probe": "probe.safetensors"' in text and '"labels": 619' in text and '"model": "seer:seer_128gf.pt"' in text
    assert "Left out: malformed names: 1, the same face again: 4." in text and "| a picture: it is damaged, as is …/list.json |" in text
    assert read_results(folder / "results.jsonl")[0].settings["archive"] == f"{root}/archive"            # nothing is lost on this machine


def test_what_was_left_out_may_be_a_number(parts, tmp_path, monkeypatch):
    "As on the page on robustness."
    monkeypatch.setattr(audit, "AUDIT", (Part("toy_x", "robustness", "?", "toy_scenes", lambda c: fake_result(c, left_out=7), FakeConfig),))
    run_audit(AuditConfig(run_dir=str(tmp_path)))
    assert "Left out: 7." in (tmp_path / "card.md").read_text()


@pytest.mark.parametrize("reason, public", [
    ("no data: ai.meta.com/datasets/x, after signing", "no data: ai.meta.com/datasets/x, after signing"), ("see https://a.org/b/c", "see https://a.org/b/c"),
    ("rel/sets/a.json is missing", "sets/a.json is missing"), ("/opt/x/y/z.so is missing", "…/z.so is missing"), ("the data are not there", "the data are not there")])
def test_reasons_stay_readable(reason, public): assert audit.public_reason(reason, ["rel/sets", "", ".", "/", "data"]) == public


def test_a_card_names_the_figures_of_its_own_parts_alone(parts, tmp_path):
    "Other parts may have left theirs in the folder."
    run_audit(AuditConfig(run_dir=str(tmp_path)))
    run_audit(AuditConfig(run_dir=str(tmp_path), parts="toy_one"))
    card, page = (tmp_path / "card.md").read_text(), (tmp_path / "card.html").read_text()
    pictures = {path.name for path in tmp_path.glob("*.png") if f"]({path.name})" in card}
    assert pictures == {"gaps.png", "toy_one.png"} and len(list(tmp_path.glob("*.png"))) == 3 and page.count("data:image/png;base64,") == 2
