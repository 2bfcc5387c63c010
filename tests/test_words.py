"Words as means of pictures: retrieval against scikit-learn, the permutation test against SciPy, folders in all spellings."
import csv
import dataclasses
import json
import unicodedata

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from seer_nb.evaluate import words
from seer_nb.evaluate.words import WordsConfig

torch.set_num_threads(1)


def problem(languages=3, concepts=9, dim=6, noise=1.0, seed=0):
    "Embeddings of words [W, D], and what they mean; the languages are of different sizes."
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(concepts, dim))
    pairs = [(k, c) for k in range(languages) for c in range(concepts - k)]
    x = np.array([centres[c] for _, c in pairs]) + noise * rng.normal(size=(len(pairs), dim))
    return x.astype(np.float32), [f"l{k}" for k, _ in pairs], [f"c{c}" for _, c in pairs]


def sklearn_precision(x, languages, concepts, k):
    languages, concepts, hits = np.array(languages), np.array(concepts), []
    for language in np.unique(languages):
        there = np.flatnonzero(languages == language)
        found = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x[there]).kneighbors(x, return_distance=False)
        hits += [concepts[i] in concepts[there][near] for i, near in enumerate(found) if languages[i] != language and concepts[i] in concepts[there]]
    return np.mean(hits)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_is_scikit_learns(k):
    x, languages, concepts = problem()
    assert np.isclose(words.translation_precision(x, languages, concepts, [k])[k], sklearn_precision(x, languages, concepts, k))


def test_chance_is_the_mean_of_random_embeddings():
    _, languages, concepts = problem()
    chance = words.translation_chance(languages, concepts)
    found = [words.translation_precision(np.random.default_rng(s).normal(size=(len(languages), 50)), languages, concepts) for s in range(60)]
    assert all(abs(np.mean([f[k] for f in found]) - chance[k]) < 0.02 for k in chance)


def test_permutation_p_value_is_scipys():
    x, languages, concepts = problem(languages=2, concepts=5, noise=2.0, seed=3)
    keep = [i for i, c in enumerate(concepts) if c != "c4"]                                # two languages of four words
    x, languages, concepts = x[keep], [languages[i] for i in keep], [concepts[i] for i in keep]
    ranks = words.translation_ranks(x, languages).numpy()
    there, back = ranks[:4, 4:] < 1, ranks[4:, :4] < 1
    statistic = lambda a, b: np.mean([[there[i, j], back[j, i]] for i, j in zip(a.astype(int), b.astype(int))])
    exact = stats.permutation_test((np.arange(4), np.arange(4)), statistic, permutation_type="pairings", vectorized=False, alternative="greater", n_resamples=10_000)
    p, drawn = words.permutation_p_value(x, languages, concepts, n_permutations=2000)
    assert np.isclose(exact.statistic, words.translation_precision(x, languages, concepts, [1])[1])
    assert abs(p - exact.pvalue) < 0.03 and abs(drawn.mean() - exact.null_distribution.mean()) < 0.02


def test_p_values_of_nothing_are_uniform():
    _, languages, concepts = problem()
    p = [words.permutation_p_value(np.random.default_rng(s).normal(size=(len(languages), 5)), languages, concepts, n_permutations=60)[0] for s in range(80)]
    assert np.mean(np.array(p) <= 0.1) < 0.2 and 0.4 < np.mean(p) < 0.75                  # ties of a coarse score make them a little large


def test_constant_features_find_nothing():
    _, languages, concepts = problem()
    same = np.ones((len(languages), 4), np.float32)
    assert words.translation_precision(same, languages, concepts, [1]) == {1: 0.0}
    assert words.permutation_p_value(same, languages, concepts)[0] == 1.0


def test_meanings_that_cannot_be_scored():
    with pytest.raises(ValueError, match="no word has a translation"): words.translation_pairs(["a", "a"], ["x", "y"])
    with pytest.raises(ValueError, match="mean the same"): words.translation_pairs(["a", "a", "b"], ["x", "x", "x"])
    with pytest.raises(ValueError, match="every word a picture"): words.mean_embeddings(np.ones((2, 3)), [0, 0], 2)
    with pytest.raises(ValueError, match="not finite"): words.mean_embeddings(np.full((2, 3), np.nan), [0, 1], 2)


def test_draws_of_pictures_are_those_of_a_loop():
    "Drawing counts is drawing pictures: the same mean and spread as resampling by hand."
    rng, (_, languages, concepts) = np.random.default_rng(0), problem(2, 8)
    owner = np.repeat(np.arange(len(languages)), 6)
    x = np.random.default_rng(1).normal(size=(len(owner), 5)) + 0.8 * np.random.default_rng(2).normal(size=(9, 5))[np.array([int(c[1]) for c in concepts])][owner]
    by_hand = []
    for _ in range(300):
        pick = np.concatenate([rng.choice(np.flatnonzero(owner == w), 6) for w in range(len(languages))])
        by_hand.append(words.translation_precision(words.mean_embeddings(x[pick], owner[pick], len(languages)), languages, concepts, [1])[1])
    draws = words.picture_draws(x, owner, languages, concepts, n_resamples=300)
    assert abs(draws.mean() - np.mean(by_hand)) < 0.03 and abs(draws.std() - np.std(by_hand)) < 0.03


def test_planted_country_is_measured():
    "A stronger cast of the countries costs a look at colours its precision, and shows in the share of neighbours of the own language."
    found = []
    for shift in (0.0, 1.0):
        toy = words.toy_words(4, shift)
        colour = torch.stack([toy.images[i][0] for i in range(len(toy.images))]).float().mean((2, 3))
        e = words.mean_embeddings(colour, toy.images.labels, 48)
        found.append((words.translation_precision(e, toy.languages, toy.concepts)[1], words.own_language_share(e, toy.languages)[0]))
    (near, own), (far, own_far) = found
    assert near > far + 0.05 and own_far > own + 0.3


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = {"wedding": {"en": "wedding", "tr": "düğün", "he": "חתונה", "ar": "زفاف", "emoji": "💒"},
         "love": {"en": "Love", "tr": "aşk", "he": "אהבה", "ar": "حب", "emoji": "❤️"},
         "summer": {"en": "summer", "tr": "yaz", "he": "קיץ", "ar": "صيف", "emoji": "🏖️"}}


def collection(root, spell=lambda word: word, per_word=3):
    "Folders of tiny pictures, all different, with folder names spelled in some way."
    import cv2
    rng = np.random.default_rng(0)
    for row in NAMES.values():
        for language, word in row.items():
            (folder := root / language / spell(word)).mkdir(parents=True)
            for i in range(per_word): (folder / f"{i}.png").write_bytes(cv2.imencode(".png", rng.integers(256, size=(16, 20, 3), dtype=np.uint8))[1].tobytes())
    with open(root / "translations.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["concept", *NAMES["love"]], *([name, *row.values()] for name, row in NAMES.items())])
    return root


SPELLINGS = {"composed": lambda w: unicodedata.normalize("NFC", w), "decomposed": lambda w: unicodedata.normalize("NFD", w), "capitals": str.upper,
             "without variation": lambda w: w.replace("\ufe0f", ""), "with marks of direction": lambda w: f"\u200f{w}\u200e"}


@pytest.mark.parametrize("how", SPELLINGS)
def test_folders_in_all_spellings_are_found(tmp_path, how):
    found = words.read_hashtags(collection(tmp_path, SPELLINGS[how]))
    assert found.left_out == {} and len(found.images) == 45 and len(found.languages) == 15
    assert set(zip(found.languages, found.concepts)) == {(language, name) for name, row in NAMES.items() for language in row}
    assert found.images[0][0].shape == (3, 16, 20) and found.images.labels.bincount().tolist() == [3] * 15


def test_json_table_is_the_same(tmp_path):
    by_csv = words.read_hashtags(collection(tmp_path))
    (tmp_path / "translations.csv").unlink()
    (tmp_path / "translations.json").write_text(json.dumps([{"concept": name, **row} for name, row in NAMES.items()]))
    by_json = words.read_hashtags(tmp_path)
    assert by_json[1:] == by_csv[1:] and by_json.images.classes == by_csv.images.classes


def test_two_spellings_of_one_word_are_refused(tmp_path):
    collection(tmp_path)
    (tmp_path / "tr" / unicodedata.normalize("NFD", "düğün")).mkdir()
    with pytest.raises(ValueError, match="one word in two spellings"): words.read_hashtags(tmp_path)


def test_pictures_under_two_words_are_left_out(tmp_path):
    collection(tmp_path)
    (tmp_path / "tr/düğün/copy.png").write_bytes((tmp_path / "en/wedding/0.png").read_bytes())
    (tmp_path / "he/אהבה/again.png").write_bytes((tmp_path / "he/אהבה/0.png").read_bytes())   # twice under one word: nobody is helped
    found = words.read_hashtags(tmp_path)
    names = [found.images.name(i) for i in range(len(found.images))]
    assert found.left_out == {"shared pictures": 2} and len(names) == 45 - 1 + 1
    assert "en/wedding/0.png" not in names and "tr/düğün/copy.png" not in names


def test_what_is_left_out_is_said(tmp_path):
    collection(tmp_path)
    (tmp_path / "en/Love").rename(tmp_path / "en/luv")
    for i in range(2): (tmp_path / f"he/קיץ/{i}.png").unlink()
    found = words.read_hashtags(tmp_path, min_images=2)
    assert found.left_out == {"no folder": ["en/Love"], "too few pictures": ["he/קיץ"], "not in the table": ["en/luv"]} and len(found.languages) == 13
    few = words.read_hashtags(tmp_path, per_word=2)
    assert few.images.labels.bincount().max() == 2 and few.images.name(0) == words.read_hashtags(tmp_path, per_word=2).images.name(0)


def test_words_of_the_table_lead_nowhere(tmp_path):
    root = collection(tmp_path / "hashtags")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/0.png").write_bytes((root / "en/Love/0.png").read_bytes())
    (root / "translations.csv").write_text("en,tr,../hashtags\nwedding,düğün,Love\n../../secret,/etc,aşk\n..,.,x\n", encoding="utf-8")
    found = words.read_hashtags(root)
    assert [found.images.name(i) for i in range(len(found.images))] == [f"{place}/{i}.png" for place in ("en/wedding", "tr/düğün") for i in range(3)]


@pytest.mark.parametrize("text, message", [("en,tr\nwedding,düğün\nwedding,yaz\n", "occurs twice in en"), ("en,tr\nlove,aşk\nLOVE,yaz\n", "occurs twice in en"), ("en;tr\na;b\n", "two languages"),
                                           ("en,EN\na,b\n", "two columns"), ("en,EN,tr\nlove,bird,kuş\n", "two columns"), ("en,tr\nlove, honey,aşk\n", "line 2 has more cells"), ("", "two languages"), ("\0", "translations.csv"), ("en,tr\nfish,balık\nbird,kuş\n", "no word has")])
def test_damaged_tables(tmp_path, text, message):
    root = collection(tmp_path / "x")
    (root / "translations.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message): words.read_hashtags(root)


def test_table_in_another_encoding_is_named(tmp_path):
    root = collection(tmp_path / "x")
    (root / "translations.csv").write_bytes("en,tr\nwedding,düğün\n".encode("utf-16"))
    with pytest.raises(ValueError, match="translations.csv"): words.read_hashtags(root)


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_run_on_folders(tmp_path):
    "A run on a collection in the real format is stored whole, returned the second time, and refused for other parameters."
    collection(tmp_path / "data/hashtags")
    config = WordsConfig(run_dir=str(tmp_path / "run"), task="hashtags", root=str(tmp_path / "data"), image_size=16, n_resamples=20, n_permutations=49)
    result = words.run_words(config)
    assert words.run_words(config) == result and result.n == 45 and result.chance == pytest.approx(1 / 3) and 0 <= result.ci_low <= result.value <= result.ci_high <= 1
    assert result.metric == "precision at 1" and result.details["languages"] == sorted(NAMES["love"]) and len(result.details["language_pairs"]) == 20
    stored = np.load(tmp_path / "run/embeddings.npy", allow_pickle=False)
    known = json.loads((tmp_path / "run/words.json").read_text())
    assert words.translation_precision(stored, known["languages"], known["concepts"])[1] == result.value
    with pytest.raises(ValueError, match="other parameters"): words.run_words(dataclasses.replace(config, center=True))
    (tmp_path / "data/hashtags/en/Love/0.png").unlink()
    with pytest.raises(ValueError, match="holds other features: images .*Remove the folder"): words.run_words(config)
    assert words.run_words(dataclasses.replace(config, run_dir=str(tmp_path / "other"))).n == 44


class Killed(BaseException):
    "Nothing may catch it, as nothing can catch kill -9."


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_killed_extraction_goes_on_and_other_weights_are_refused(tmp_path, monkeypatch, n):
    "Of 45 pictures in batches of 12, n batches are done when the network stops; the second run does the others, to the same bits."
    collection(tmp_path / "data/hashtags")
    config = WordsConfig(run_dir=str(tmp_path / "whole"), task="hashtags", root=str(tmp_path / "data"), image_size=16, extract_batch=12, n_resamples=20, n_permutations=49)
    whole, seen, real = words.run_words(config), [], words.open_model
    def opened(stop, seed=0):
        def look(module, inputs):
            seen.append(len(inputs[0]))
            if len(seen) > stop: raise Killed
        def open_model(spec, **how):
            seen.clear()
            model = real(spec, **{**how, "seed": seed})
            model.register_forward_pre_hook(look)
            return model
        monkeypatch.setattr(words, "open_model", open_model)
    half = dataclasses.replace(config, run_dir=str(tmp_path / "half"))
    opened(1 + n)                                                                          # one image shows how wide features are
    with pytest.raises(Killed): words.run_words(half)
    opened(99)
    result = words.run_words(half)
    assert seen == [1, 12, 12, 12, 9][:1] + [12, 12, 12, 9][n:] and dataclasses.replace(result, seconds=0) == dataclasses.replace(whole, seconds=0)
    assert np.array_equal(np.load(tmp_path / "half/embeddings.npy"), np.load(tmp_path / "whole/embeddings.npy"))
    opened(99, seed=1)
    with pytest.raises(ValueError, match="holds other features: weights"): words.run_words(half)


def test_run_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)translations.csv.*where to get it"):
        words.run_words(WordsConfig(run_dir=str(tmp_path / "run"), task="hashtags", root=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_other_pixels_under_the_same_names_are_another_result(tmp_path):
    root = collection(tmp_path / "data/hashtags")
    config = WordsConfig(run_dir=str(tmp_path / "run"), task="hashtags", root=str(tmp_path / "data"), image_size=16, n_resamples=20, n_permutations=20)
    first, place = words.run_words(config), root / "ar/حب/0.png"
    place.write_bytes(place.read_bytes() + b"\0")                                          # the same pixels
    assert words.run_words(config) == first
    import cv2
    for path in root.rglob("*.png"): path.write_bytes(cv2.imencode(".png", 255 - cv2.imread(str(path)) if path.name != "2.png" else cv2.imread(str(path)))[1].tobytes())
    assert words.run_words(dataclasses.replace(config, run_dir=str(tmp_path / "other"))).settings != first.settings
    with pytest.raises(ValueError, match="holds other features: data"): words.run_words(config)


@pytest.mark.parametrize("changed", [{"per_word": 1}, {"min_images": 1}, {"min_images": 0}, {"per_word": -3}])
def test_an_interval_needs_two_pictures_of_a_word(tmp_path, changed):
    with pytest.raises(ValueError, match="2 or more"): words.run_words(WordsConfig(run_dir=str(tmp_path / "run"), **changed))
    assert not (tmp_path / "run").exists()


def test_words_with_one_picture_are_left_out_and_too_few_are_said(tmp_path):
    root = collection(tmp_path / "data/hashtags")
    for i in range(2): (root / f"he/קיץ/{i}.png").unlink()
    config = WordsConfig(run_dir=str(tmp_path / "run"), task="hashtags", root=str(tmp_path / "data"), image_size=16, n_resamples=20, n_permutations=20)
    result = words.run_words(config)
    assert result.details["left_out"] == {"too few pictures": ["he/קיץ"]} and result.ci_low < result.ci_high
    with pytest.raises(ValueError, match="15 words 0 have no folder, and 15 have fewer than 9 pictures"): words.run_words(dataclasses.replace(config, min_images=9))


def test_long_table_is_read_in_one_pass(tmp_path):
    "A table as long as a bomb: each word is compared once, not with all others."
    n = 30_000
    (tmp_path / "t.csv").write_text("en,fr\n" + "".join(f"e{i},f{i}\n" for i in range(n)))
    assert len(words.read_table(tmp_path / "t.csv")[1]) == n


def test_constant_features_of_unequal_words_find_nothing():
    "Means over different numbers of equal pictures differ in the last digits; that finds no translation."
    rng, languages, concepts = np.random.default_rng(1), ["a"] * 20 + ["b"] * 20, list(range(20)) * 2
    owner = np.repeat(np.arange(40), rng.integers(2, 40, 40))
    x = np.tile(rng.normal(size=300).astype(np.float32), (len(owner), 1))
    e = words.mean_embeddings(x, owner, 40)
    assert words.translation_precision(e, languages, concepts, [1]) == {1: 0.0}
    assert (words.picture_draws(x, owner, languages, concepts, n_resamples=10) == 0).all()


def test_neighbours_of_a_small_language_are_all_there():
    x = np.random.default_rng(0).normal(size=(5, 3))
    near = words.nearest_words(x, list("vwxyz"), ["big"] * 4 + ["small"], list("abcda"), k=5)
    assert [len(row["neighbours"]) for row in near] == [1, 1, 1, 1, 4]


@pytest.mark.parametrize("spelled, form", [("İSTANBUL", "istanbul"), ("i̇stanbul", "istanbul"), ("wed\u200bding", "wedding"), ("wed\u00adding", "wedding"), ("# Wedding ", "wedding"), ("Straße", "strasse")])
def test_one_form_of_all_spellings(spelled, form):
    assert words.one_spelling(spelled) == form


def test_counted_sums_are_those_of_repeated_pictures():
    rng = np.random.default_rng(0)
    x, owner, counts = rng.normal(size=(40, 6)), np.repeat(np.arange(8), 5), rng.integers(1, 4, 40)
    again = words.mean_embeddings(np.repeat(x, counts, 0), np.repeat(owner, counts), 8)
    torch.testing.assert_close(words.mean_embeddings(x, owner, 8, counts), again)
