"""Texts, batches, the count models that judge them, and the clustered task."""

import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from moe_numpy.training import clusters, data, ngram

GREEK_AND_EMOJI = "".join(map(chr, range(0x3B1, 0x3CA))) + "\r\n\t\U0001f600\U0001f680 "


@pytest.fixture(scope="module")
def corpus():
    return data.default_corpus(90_000)


def write(tmp_path, text):
    (tmp_path / "text.txt").write_bytes(text.encode("utf-8"))
    return tmp_path / "text.txt"


def domain_text(corpus, split, domain):
    ids, label = getattr(corpus, split), getattr(corpus, f"{split}_domain")
    return corpus.decode(ids[label == corpus.domains.index(domain)])


def test_the_default_corpus_is_the_same_every_time(corpus):
    assert data.default_corpus(90_000).sha256 == corpus.sha256


def test_the_seed_changes_the_arithmetic_alone(corpus):
    other = data.default_corpus(90_000, seed=1)
    assert other.sha256 != corpus.sha256
    for domain in corpus.domains:
        same = domain_text(other, "train", domain) == domain_text(corpus, "train", domain)
        assert same == (domain != "arithmetic")


def test_domains_take_equal_turns_passage_by_passage(corpus):
    assert len(corpus.train) == 81_000 and len(corpus.validation) == 9_000
    turns = np.repeat(np.arange(3), data.PASSAGE)
    np.testing.assert_array_equal(corpus.train_domain, np.tile(turns, 27))
    np.testing.assert_array_equal(corpus.validation_domain, np.tile(turns, 3))


def test_the_default_alphabet_is_printable_ascii_and_newline(corpus):
    assert list(map(ord, corpus.alphabet)) == [10, *range(32, 127)]
    assert data._ascii("a\tb\u2019s \u201cc\u201d \u2013 caf\u00e9\f\r\n") == 'a   b\'s "c" - caf\n'


def test_every_complete_line_of_arithmetic_is_true(corpus):
    for split in ("train", "validation"):
        text = domain_text(corpus, split, "arithmetic")
        assert set(text) <= set("0123456789+-*=\n")
        lines = text.split("\n")[1:-1]
        assert len(lines) > 200
        for line in lines:
            question, answer = line.split("=")
            sign = next(sign for sign in "+*-" if sign in question)
            a, b = map(int, question.split(sign))
            assert int(answer) == {"+": a + b, "-": a - b, "*": a * b}[sign], line


def test_validation_repeats_no_long_passage_of_training():
    corpus = data.default_corpus(900_000)
    for domain, word in (("english", " the "), ("code", "self.")):
        train = domain_text(corpus, "train", domain)
        validation = domain_text(corpus, "validation", domain)
        assert train.count(word) > 200 and validation.count(word) > 20
        pieces = [validation[at : at + 200] for at in range(0, len(validation) - 200, 500)]
        assert sum(piece in train for piece in pieces) == 0


@pytest.mark.parametrize("characters", [29, -1, 10**9])
def test_an_impossible_length_is_refused(characters):
    with pytest.raises(ValueError, match=rf"30 <= characters <= \d+ .*got {characters}\. Change"):
        data.default_corpus(characters)


@pytest.mark.parametrize("length", [1, 9, 10, 1_115_394])
def test_first_ninety_percent_of_a_text_trains(tmp_path, length):
    text = ("abcdefg" * (length // 7 + 1))[:length]
    corpus = data.text_corpus(write(tmp_path, text))
    assert len(corpus.train) == int(0.9 * length)
    assert corpus.decode(corpus.train) + corpus.decode(corpus.validation) == text
    assert len(data.text_corpus(tmp_path / "text.txt", 0.25).train) == int(0.75 * length)


def test_any_alphabet_survives_the_round_trip(tmp_path):
    corpus = data.text_corpus(write(tmp_path, "\ufeff" + GREEK_AND_EMOJI * 3))
    assert corpus.alphabet == "".join(sorted(set(GREEK_AND_EMOJI)))
    ids = corpus.encode(GREEK_AND_EMOJI)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [corpus.alphabet.index(character) for character in GREEK_AND_EMOJI]
    assert corpus.decode(ids) == GREEK_AND_EMOJI
    assert corpus.decode(corpus.encode("")) == corpus.decode([]) == ""
    wide = data.text_corpus(write(tmp_path, "".join(map(chr, range(0x10000, 0x20001)))))
    assert wide.train.dtype == np.uint32 and wide.decode([65_536]) == "\U00020000"


def test_the_hash_pins_the_text(tmp_path):
    digest = "bbb59da3af939f7af5f360f2ceb80a496e3bae1cd87dde426db0ae40677e1c2c"  # of sha256sum
    assert data.text_corpus(write(tmp_path, "abcabc")).sha256 == digest


def test_an_unknown_character_is_named(corpus):
    with pytest.raises(ValueError, match=r"encode: .*U\+20AC\) at position 2\. Remove"):
        corpus.encode("10\u20ac")
    with pytest.raises(ValueError, match=r"U\+D800"):
        corpus.encode("\ud800")


@pytest.mark.parametrize("bad", [96, -1])
def test_an_unknown_id_is_refused(corpus, bad):
    with pytest.raises(ValueError, match=rf"Corpus\.decode: .*vocab_size \(96\), got {bad}\. Dec"):
        corpus.decode([0, bad])


@pytest.mark.parametrize("bad", [[0.0, 1.0], [True, False], [[1, 2], [3, 4]], 1, "a"])
def test_only_a_row_of_integers_can_be_decoded(corpus, bad):
    with pytest.raises(ValueError, match=r"Corpus\.decode: ids must be a row of integers, got "):
        corpus.decode(bad)
    assert corpus.decode([]) == ""


def test_windows_are_cut_from_an_array_only():
    with pytest.raises(ValueError, match="windows: ids must be an array, got list"):
        data.windows([1, 2, 3], 1)


def test_files_that_cannot_be_read_are_explained(tmp_path):
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(ValueError, match=r"text_corpus: path must be a readable file, got"):
            data.text_corpus(path)
    for text in ("", "\ufeff"):
        with pytest.raises(ValueError, match="the file must hold text"):
            data.text_corpus(write(tmp_path, text))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_offset_of_a_broken_byte_is_the_one_in_the_file(tmp_path, mark):
    path = tmp_path / "latin1.txt"
    path.write_bytes(mark + b"caf\xe9!")
    with pytest.raises(ValueError, match=rf"byte 0xe9 at offset {len(mark) + 3} of .*Save"):
        data.text_corpus(path)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, math.nan])
def test_a_fraction_that_leaves_a_split_empty_is_refused(tmp_path, fraction):
    with pytest.raises(ValueError, match="0 < validation_fraction < 1, got"):
        data.text_corpus(write(tmp_path, "abc"), fraction)


def test_targets_are_the_next_characters():
    rng, ids = np.random.default_rng(3), np.arange(1000, dtype=np.uint16)
    token_BT, target_BT = data.sample_batch(rng, ids, batch=5, context=7)
    assert token_BT.shape == target_BT.shape == (5, 7)
    assert token_BT.dtype == target_BT.dtype == np.uint16
    np.testing.assert_array_equal(target_BT, token_BT + 1)
    np.testing.assert_array_equal(np.diff(token_BT), 1)
    np.testing.assert_array_equal(data.sample_batch(3, ids, 5, 7)[0], token_BT)
    assert (data.sample_batch(rng, ids, 5, 7)[0] != token_BT).any()  # a generator moves on


def test_all_windows_are_equally_likely_up_to_the_last():
    token_BT, _ = data.sample_batch(0, np.arange(20), batch=32_000, context=4)
    count = np.bincount(token_BT[:, 0])
    assert len(count) == 16
    assert np.abs(count - 2000).max() < 5 * math.sqrt(2000)


@pytest.mark.parametrize("length", [6, 10, 11, 15, 16])
def test_windows_make_every_character_a_target_once(length):
    token_BT, target_BT = data.windows(np.arange(length), context=5)
    whole = (length - 1) // 5 * 5
    assert target_BT.ravel().tolist() == list(range(1, whole + 1))
    np.testing.assert_array_equal(token_BT, target_BT - 1)


def test_a_text_of_one_window_is_enough_and_one_less_is_not(tmp_path):
    corpus = data.text_corpus(write(tmp_path, "a" * 50))
    data.require_length(corpus, 4)
    with pytest.raises(ValueError, match=r"the validation split must .*\(6\) characters, got 5\."):
        data.require_length(corpus, 5)
    with pytest.raises(ValueError, match=r"the training split must .*\(46\) characters, got 45\."):
        data.require_length(corpus, 45)
    assert data.windows(corpus.validation, 4)[0].shape == (1, 4)
    with pytest.raises(ValueError, match=r"windows: ids must hold"):
        data.windows(corpus.validation, 5)
    with pytest.raises(ValueError, match=r"sample_batch: ids must hold"):
        data.sample_batch(0, corpus.validation, 1, 5)
    with pytest.raises(ValueError, match=r"batch must be a whole number of at least 1, got 0"):
        data.sample_batch(0, corpus.train, 0, 5)
    with pytest.raises(ValueError, match=r"context must be a whole number of at least 1, got 0"):
        data.windows(corpus.train, 0)
    for wrong in (2.5, True):
        with pytest.raises(ValueError, match=rf"batch must be a whole number .* got {wrong}"):
            data.sample_batch(0, corpus.train, wrong, 5)


@pytest.mark.parametrize("ids", [np.zeros((8, 8), int), np.zeros(64), np.array(1)])
def test_ids_are_a_row_of_integers(ids):
    for do in (lambda: data.windows(ids, 4), lambda: data.sample_batch(0, ids, 1, 4)):
        with pytest.raises(ValueError, match="ids must be a row of integers, got"):
            do()


def slow_probability(followers, vocab_size, history, character):
    """Witten-Bell by recursion; `followers` maps a context to the counts of what came after it."""
    shorter = 1 / vocab_size
    if history:
        shorter = slow_probability(followers, vocab_size, history[1:], character)
    seen = followers[history]
    if not seen:
        return shorter
    return (seen[character] + len(seen) * shorter) / (seen.total() + len(seen))


def slow_loss(train, validation, vocab_size, order):
    followers = defaultdict(Counter)
    for length in range(order):
        for at in range(length, len(train)):
            followers[tuple(train[at - length : at])][train[at]] += 1
    total = 0.0
    for at, character in enumerate(validation):
        history = tuple(validation[max(0, at - order + 1) : at])
        total -= math.log(slow_probability(followers, vocab_size, history, character))
    return total / len(validation)


@pytest.mark.parametrize(
    ("symbols", "lengths"), [(2, (60, 40)), (5, (200, 80)), (9, (30, 3)), (3, (1, 1)), (4, (2, 9))]
)
@pytest.mark.parametrize("vocab_size", [11, 1_114_112])  # the latter: its 6th power is over 2**64
def test_count_models_agree_with_a_slow_dictionary(symbols, lengths, vocab_size):
    rng = np.random.default_rng(symbols)
    known = rng.integers(vocab_size, size=symbols).astype(np.uint32)
    train, validation = (known[rng.integers(symbols, size=n)] for n in lengths)
    losses = ngram.reference_losses(train, validation, vocab_size, max_order=6)
    assert list(losses) == ["uniform", "unigram", *(f"{n}-gram" for n in range(2, 7))]
    assert losses["uniform"] == pytest.approx(math.log(vocab_size), abs=1e-12)
    for order, loss in enumerate(list(losses.values())[1:], start=1):
        slow = slow_loss(train.tolist(), validation.tolist(), vocab_size, order)
        assert loss == pytest.approx(slow, abs=1e-12), order


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_context(order):
    train = np.random.default_rng(0).integers(4, size=300)
    name = "unigram" if order == 1 else f"{order}-gram"

    def total_nats(ids):
        return len(ids) * ngram.reference_losses(train, np.array(ids), 6, order)[name]

    for history in ([0, 1, 2, 3], [3, 3, 1, 0], [2, 5, 0, 1], [5, 5, 5, 5]):
        before = total_nats(history)
        mass = sum(math.exp(before - total_nats([*history, character])) for character in range(6))
        assert mass == pytest.approx(1, abs=1e-12)


def test_count_models_refuse_what_they_cannot_count():
    ids = np.array([0, 1, 2])
    with pytest.raises(ValueError, match="train must hold at least one character"):
        ngram.reference_losses(ids[:0], ids, 3)
    with pytest.raises(ValueError, match=r"validation .*vocab_size \(2\), got ids from 0 to 2"):
        ngram.reference_losses(ids[:2], ids, 2)
    with pytest.raises(ValueError, match="max_order must be a whole number of at least 1, got 0"):
        ngram.reference_losses(ids, ids, 3, 0)


@pytest.fixture(scope="module")
def task():
    return clusters.cluster_task(0, clusters=3, width_in=7, width_out=5)


def test_the_same_seed_gives_the_same_task_and_sample(task):
    again, other = (clusters.cluster_task(seed, 3, width_in=7, width_out=5) for seed in (0, 1))
    sample = clusters.sample_clusters(5, task, 50)
    assert sample[0].dtype == sample[1].dtype == np.float32
    assert all(map(np.array_equal, sample, clusters.sample_clusters(5, again, 50)))
    assert (other.center_EC != task.center_EC).all()


def test_inputs_lie_around_the_center_of_their_cluster(task):
    x_NC, y_NO, cluster_N = clusters.sample_clusters(1, task, 6_000, np.float64)
    assert x_NC.shape == (6_000, 7) and y_NO.shape == (6_000, 5)
    assert np.bincount(cluster_N).min() > 1_850
    for cluster in range(3):
        mine_NC = x_NC[cluster_N == cluster]
        np.testing.assert_allclose(mine_NC.mean(0), task.center_EC[cluster], atol=0.06)
        np.testing.assert_allclose(mine_NC.std(0), task.spread, atol=0.03)


def test_each_cluster_has_a_standardized_nonlinear_function_of_its_own(task):
    x_NC, y_NO, cluster_N = clusters.sample_clusters(3, task, 9_000, np.float64)
    for cluster in range(3):
        mine_N = cluster_N == cluster
        error_N = ((task.target(x_NC, cluster) - y_NO) ** 2).mean(1)
        assert error_N[mine_N].max() < 1e-20
        assert np.median(error_N[~mine_N]) > 0.5  # another cluster's function is no substitute
        np.testing.assert_allclose(y_NO[mine_N].mean(0), 0, atol=0.1)
        np.testing.assert_allclose(y_NO[mine_N].var(0), 1, atol=0.1)
        design = np.column_stack([x_NC[mine_N], np.ones(mine_N.sum())])
        fit = np.linalg.lstsq(design, y_NO[mine_N])[0]
        assert ((y_NO[mine_N] - design @ fit) ** 2).mean() > 0.1


def test_impossible_tasks_and_samples_are_refused(task):
    for name in ("clusters", "width_in", "width_out"):
        with pytest.raises(
            ValueError, match=rf"cluster_task: {name} must be a whole number of at least 1, got 0\."
        ):
            clusters.cluster_task(0, **{name: 0})
    for spread in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="spread must be positive and finite"):
            clusters.cluster_task(0, spread=spread)
    with pytest.raises(ValueError, match="n must be a whole number of at least 1, got 0"):
        clusters.sample_clusters(0, task, 0)
    for dtype in (np.int64, "float16", "zz"):
        with pytest.raises(ValueError, match="sample_clusters: dtype must be one of 'float32', "):
            clusters.sample_clusters(0, task, 3, dtype)


def test_an_alphabet_of_65536_characters_still_fits_16_bits():
    alphabet = "".join(map(chr, range(65_536)))
    assert data.encode(alphabet[-1], alphabet).dtype == np.uint16


def test_the_arithmetic_multiplies_all_numbers_up_to_twelve():
    text = data._arithmetic(20_000, np.random.default_rng(0))
    factors = {int(x) for pair in re.findall(r"(?m)^(\d+)\*(\d+)=", text) for x in pair}
    assert factors == set(range(13))


def test_the_terms_of_sums_are_all_below_a_hundred():
    text = data._arithmetic(60_000, np.random.default_rng(0))
    sums = [line for line in text.splitlines()[:-1] if "*" not in line]
    terms = {int(n) for line in sums for n in re.findall(r"\d+", line.partition("=")[0])}
    assert terms == set(range(100))


def test_the_smallest_corpus_is_whole_and_a_split_is_rounded_down():
    for seed in range(30):
        corpus = data.default_corpus(30, seed)
        assert len(corpus.train) + len(corpus.validation) == 30
    assert len(data.default_corpus(3 * 1011).train) == 3 * 909  # 909.9 of each domain


def test_the_experts_of_the_clusters_start_at_their_gain():
    task = clusters.cluster_task(0, clusters=50, width_in=16)
    assert task.w_in_ECF.std() == pytest.approx(clusters.GAIN / 4, rel=0.02)
