"Style: artists apart, content-matched accuracy against a naive one, retrieval against scikit-learn, folders and lists as WikiArt has them."
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from seer_nb.evaluate import style
from seer_nb.evaluate.tasks import read_results

torch.set_num_threads(1)


def collection(n=3000, n_artists=80, n_styles=9, seed=0):
    "Works of artists who change style now and then, some styles small."
    rng = np.random.default_rng(seed)
    artists = rng.integers(n_artists, size=n) ** 2 // n_artists                # some make many works
    home = rng.integers(n_styles, size=n_artists)
    styles = np.where(rng.random(n) < 0.9, home[artists], rng.integers(n_styles, size=n))
    return styles, np.char.add("artist-", artists.astype(str))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_no_artist_is_on_both_sides(seed, share):
    styles, artists = collection(seed=seed)
    test = style.hold_out_artists(styles, artists, share, seed)
    assert not set(artists[test]) & set(artists[~test]) and 0 < test.mean() < 0.5
    for k in np.unique(styles): assert test[styles == k].mean() <= 0.5                      # every style keeps half
    assert np.array_equal(test, style.hold_out_artists(styles, artists, share, seed))       # the same every time
    assert not np.array_equal(test, style.hold_out_artists(styles, artists, share, seed + 7))


def test_styles_with_one_artist_stay_in_training():
    styles, artists = [0, 0, 0, 1, 1, 1, 1], ["solo", "solo", "solo", "a", "b", "c", "d"]
    test = style.hold_out_artists(styles, artists, 0.25)
    assert not test[:3].any() and test[3:].sum() == 1
    with pytest.raises(ValueError, match="no artist"): style.hold_out_artists([0, 0, 1], ["a", "a", "b"], 0.3)


def test_the_order_of_works_does_not_matter():
    styles, artists = collection(400)
    test, order = style.hold_out_artists(styles, artists, 0.3), np.random.default_rng(3).permutation(400)
    assert np.array_equal(style.hold_out_artists(styles[order], artists[order], 0.3), test[order])


def test_matched_accuracy_is_the_naive_one():
    rng = np.random.default_rng(0)
    hits, styles, contents = rng.random(500) < 0.6, rng.integers(6, size=500), rng.integers(-1, 20, size=500)
    per_subject = []
    for c in range(20):
        recalls = [hits[(contents == c) & (styles == k)].mean() for k in range(6) if ((contents == c) & (styles == k)).any()]
        if len(recalls) > 1: per_subject.append((np.mean(recalls), 1 / len(recalls)))
    assert style.matched_accuracy(hits, styles, contents) == pytest.approx(tuple(np.mean(per_subject, 0)))
    with pytest.raises(ValueError, match="two styles"): style.matched_accuracy([1, 0], [0, 0], [3, 3])
    with pytest.raises(ValueError, match="two styles"): style.matched_accuracy([1, 0], [0, 1], [-1, -1])


def test_whoever_reads_only_the_subject_is_at_chance_when_matched():
    "However strongly subjects go with styles, and whatever answer is given to each subject."
    rng = np.random.default_rng(1)
    for confound in (0.0, 0.5, 0.95):
        styles = rng.integers(5, size=4000)
        contents = np.where(rng.random(4000) < confound, styles, rng.integers(5, size=4000))
        answer = contents                                                                   # the style that goes with the subject
        assert (answer == styles).mean() > confound
        value, blind = style.matched_accuracy(answer == styles, styles, contents)
        assert value == pytest.approx(blind) == pytest.approx(0.2)
        assert style.matched_accuracy(np.ones(4000), styles, contents)[0] == 1              # whoever sees style is right everywhere


def test_retrieval_is_scikit_learns():
    rng = np.random.default_rng(0)
    x, y, q, t = rng.normal(size=(200, 8)).astype(np.float32), rng.integers(4, size=200), rng.normal(size=(30, 8)).astype(np.float32), rng.integers(4, size=30)
    near = NearestNeighbors(metric="cosine", algorithm="brute").fit(x).kneighbors(q, 10, return_distance=False)
    expected = [[np.mean(y[near[m, :k]] == t[m]) for k in style.KS] for m in range(30)]
    np.testing.assert_allclose(style.style_precision(x, y, torch.from_numpy(q), t), expected)


def test_intervals_draw_artists():
    rng = np.random.default_rng(0)
    artists, hits = np.repeat(np.arange(12), 40), np.repeat(rng.random(12) < 0.5, 40)
    low, high = style.artist_interval(np.mean, artists, hits)
    per_artist = hits.reshape(12, 40).mean(1)
    assert high - low == pytest.approx(2 * 1.96 * per_artist.std() / 12**0.5, rel=0.2)       # as wide as twelve coins
    assert low < hits.mean() < high


def test_one_artist_has_no_interval():
    with pytest.raises(ValueError, match="one artist"): style.artist_interval(np.mean, ["a"] * 9, np.arange(9) % 2)


def test_the_probe_is_above_chance_and_splitting_by_work_flatters_it(tmp_path):
    "On features that hold an artist and, weakly, a style."
    rng, (styles, artists) = np.random.default_rng(0), collection(1500, 60, 4)
    _, who = np.unique(artists, return_inverse=True)
    x = torch.from_numpy((rng.normal(size=(4, 40))[styles] * 0.35 + rng.normal(size=(who.max() + 1, 40))[who] + rng.normal(size=(1500, 40))).astype(np.float32))
    styles, right = torch.from_numpy(styles), []
    for test in (style.hold_out_artists(styles.numpy(), artists, 0.3), rng.random(1500) < 0.3):
        scores, _ = style.probe_styles((x[~test], styles[~test], artists[~test]), x[test], 4)
        right.append((scores.argmax(1) == styles[test]).double().mean().item())
    assert right[1] > right[0] + 0.05 and right[0] > 0.3


def wikiart(root, n=120, genres=True):
    "Toy paintings in WikiArt's folders, with ArtGAN's lists."
    works, lines = style.toy_works(n), []
    for i in range(n):
        name = works.data.name(i).replace("jpg", "png")
        (root / "wikiart" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(works.data.read(i).permute(1, 2, 0).numpy()).save(root / "wikiart" / name)
        lines.append((name, works.data.labels[i].item(), works.contents[i]))
    for part, rows in {"train": lines[::2], "val": lines[1::2]}.items():
        (root / f"wikiart/style_{part}.csv").write_text("".join(f"{name},{k}\n" for name, k, _ in rows))
        if genres: (root / f"wikiart/genre_{part}.csv").write_text("".join(f"{name},{c}\n" for name, _, c in rows[2:]))
    return works, [name for name, _, _ in lines]


def test_folders_and_lists_are_read(tmp_path):
    toy, names = wikiart(tmp_path)
    works = style.read_works("wikiart", tmp_path)
    where = [names.index(works.data.name(i)) for i in range(len(works.data))]
    assert works.data.classes == tuple(style.STYLES) and np.array_equal(works.data.labels, toy.data.labels[where])
    assert np.array_equal(works.artists, toy.artists[where])
    known = works.contents >= 0
    assert (~known).sum() == 4 and np.array_equal(works.contents[known], toy.contents[where][known])
    assert torch.equal(works.data.read(5), toy.data.read(where[5]))
    few = style.read_works("wikiart", tmp_path, 30)
    assert len(few.data) == len(few.artists) == 30 and torch.equal(few.data.read(2), works.data.read([works.data.name(i) for i in range(120)].index(few.data.name(2))))
    train, test = style.split_works(works, style.StyleConfig(task="wikiart", root=str(tmp_path), split="lists"))
    assert sorted([*train, *test]) == list(range(120)) and {works.data.name(i) for i in test} == set(names[1::2])


def test_a_run_on_folders(tmp_path):
    wikiart(tmp_path, 100)
    for split in ("artists", "lists"):
        config = style.StyleConfig(run_dir=str(tmp_path / split), task="wikiart", root=str(tmp_path), split=split, l2_count=1)
        result = style.run_style(config)
        assert style.run_style(config) == result == read_results(tmp_path / split / "results.jsonl")[0]
        details = result.details
        assert (details["shared_artists"] == 0) == (split == "artists") and result.paper is None
        assert sum(row["n"] for row in details["styles"]) == result.n == len(np.load(tmp_path / split / "scores.npy"))
        assert sum(row["value"] * row["n"] for row in details["styles"] if row["n"]) / result.n == pytest.approx(result.value)
        assert result.ci_low <= result.value <= result.ci_high and 0 < details["matched"]["chance"] < 1
        assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in details["retrieval"].values())


def test_bad_folders_are_refused(tmp_path):
    base = style.StyleConfig(run_dir=str(tmp_path / "run"), task="wikiart", root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="where to get it"): style.run_style(base)
    wikiart(tmp_path, 40, genres=False)
    (tmp_path / "wikiart/style_val.csv").unlink()
    with pytest.raises(FileNotFoundError, match="style_val.csv"): style.run_style(dataclasses.replace(base, split="lists"))
    (tmp_path / "wikiart/style_val.csv").write_text("ink/a_b.png;3\n")
    with pytest.raises(ValueError, match="a path and a number"): style.run_style(dataclasses.replace(base, split="lists"))
    Image.new("RGB", (8, 8)).save(tmp_path / "wikiart/ink/anonymous.png")
    with pytest.raises(ValueError, match="names no artist"): style.run_style(base)
    assert not (tmp_path / "run").exists()


def test_names_in_lists_open_nothing(tmp_path):
    "A list only marks works that are in the folders: a name that leads elsewhere marks none."
    _, names = wikiart(tmp_path, 40, genres=False)
    (tmp_path / "wikiart/style_val.csv").write_text(f"../../secret_a.png,1\n/etc/passwd,2\n{names[1]},0\n")
    works = style.read_works("wikiart", tmp_path)
    _, test = style.split_works(works, style.StyleConfig(task="wikiart", root=str(tmp_path), split="lists"))
    assert [works.data.name(i) for i in test] == [names[1]]


def test_an_artist_paints_alike_whatever_is_shown():
    "The same work, shown in another style, differs; without confounding every style shows every subject."
    works = style.toy_works(2000, confound=0.0)
    table = np.zeros((5, 10))
    np.add.at(table, (works.data.labels.numpy(), works.contents), 1)
    assert table.min() > 15
    tied = style.toy_works(500, confound=1.0)
    assert np.array_equal(tied.contents // 2, tied.data.labels.numpy())
    assert len({bytes(works.data.read(i).numpy()) for i in range(20)}) == 20


def paint(root, artists):
    "Works of the artists of each style, twenty each."
    for k, names in artists.items():
        for name in names:
            for i in range(20):
                (root / "wikiart" / k).mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(root / "wikiart" / k / f"{name}_{i}.png")


def test_too_few_artists_are_said_before_anything_is_written(tmp_path):
    base = style.StyleConfig(run_dir=str(tmp_path / "run"), task="wikiart", root=str(tmp_path / "two"))
    paint(tmp_path / "two", {"ink": ["a", "b"], "points": ["c", "d"]})
    with pytest.raises(ValueError, match="validation"): style.run_style(base)               # one artist a style is left, none to choose the penalty by
    paint(tmp_path / "one", {"ink": ["a", "b"], "points": ["c"]})
    with pytest.raises(ValueError, match="by one artist"): style.run_style(dataclasses.replace(base, root=str(tmp_path / "one"), l2_count=1))
    assert not (tmp_path / "run").exists()
    assert style.run_style(dataclasses.replace(base, l2_count=1)).details["test_artists"] == 2


def test_other_works_or_lists_are_another_measurement(tmp_path):
    _, names = wikiart(tmp_path, 60)
    config = style.StyleConfig(task="wikiart", root=str(tmp_path), split="lists", l2_count=1)
    seen = [style.style_fingerprint(*style.open_works(config))]
    def changed():
        seen.append(style.style_fingerprint(*style.open_works(config)))
        return seen[-1] not in seen[:-1]
    top = tmp_path / "wikiart"
    first = style.read_works("wikiart", tmp_path).data.name(0)
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(top / first)
    assert changed()
    (top / "style_val.csv").write_text("\n".join((top / "style_val.csv").read_text().splitlines()[1:]) + "\n")
    assert changed()
    (top / "genre_val.csv").unlink()
    assert changed()
    (top / names[5]).unlink()
    assert changed()


def test_a_run_on_other_works_is_not_the_old_result(tmp_path):
    wikiart(tmp_path, 60)
    config = style.StyleConfig(run_dir=str(tmp_path / "a"), task="wikiart", root=str(tmp_path), split="works", l2_count=1)
    first = style.run_style(config)
    (tmp_path / "wikiart/genre_val.csv").unlink()                                            # the matched accuracy has other subjects now
    assert style.run_style(config).details["matched"] != first.details["matched"]


def test_what_is_left_out_is_counted(tmp_path):
    _, names = wikiart(tmp_path, 60)
    top = tmp_path / "wikiart"
    (top / "style_train.csv").write_text((top / "style_train.csv").read_text() + "ink/gone_1.png,1\nink/gone_2.png,1\n")
    (top / "style_val.csv").write_text("\n".join((top / "style_val.csv").read_text().splitlines()[:-3]) + "\n")
    details = style.run_style(style.StyleConfig(run_dir=str(tmp_path / "a"), task="wikiart", root=str(tmp_path), split="lists", l2_count=1)).details
    assert details["lists"] == {"without_work": 2, "unlisted": 3}
    assert all(row["few"] == (row["artists"] < style.FEW_ARTISTS) for row in details["styles"])
    rng = np.random.default_rng(0)
    styles, contents = rng.integers(6, size=60), rng.integers(-1, 30, size=60)
    naive = [c >= 0 and len(set(styles[contents == c])) > 1 for c in contents]
    assert style.in_two_styles(styles, contents).tolist() == naive and 0 < sum(naive) < 60


def test_lists_of_other_kinds_are_refused_by_name(tmp_path):
    for text in ("a.jpg,many\n", f"{'a' * 200_000},1\n", f"a.jpg,{'9' * 5000}\n"):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(ValueError, match="list.csv"): style.read_numbers(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("\ufeffa.jpg,1\n", encoding="utf-8")
    assert style.read_numbers(tmp_path / "list.csv") == {"a.jpg": 1}
