"""Training: it learns, it repeats itself to the bit, it stops and goes on as if it had not."""

import itertools
import math
import signal
import threading

import numpy as np
import pytest
import tiny

from moe_numpy import settings, tree
from moe_numpy.config import (
    SGD,
    AdamW,
    Capacity,
    GaussianNoise,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadLoss,
    SwitchLoss,
    ZLoss,
)
from moe_numpy.moe import balance
from moe_numpy.training import data, loop, ngram, shards
from moe_numpy.transformer import model

TERMS = (SwitchLoss(), ImportanceLoss(), LoadLoss(), ZLoss())
FULL = tiny.moe(
    noise=LearnedNoise(),
    capacity=Capacity(factor=0.75, overflow="next_best"),
    bias_rate=0.01,
    bias_with_loss=True,
    balance=(SwitchLoss(), ImportanceLoss(), ZLoss()),
)
VARIANTS = {
    "learned noise, next best, bias rule": FULL,
    "fixed noise, drop by choice": tiny.moe(
        noise=GaussianNoise(), capacity=Capacity(factor=0.6, priority="choice"), balance=TERMS
    ),
    "jitter, drop by score": tiny.moe(
        noise=InputJitter(eps=0.2), capacity=Capacity(factor=0.8, priority="score"), top_k=1
    ),
    "dense": None,
}
OPTIMIZERS = {"AdamW": AdamW(), "SGD": SGD(momentum=0.8, weight_decay=0.01)}
TOKENS = 4 * 16


class StoppedError(Exception):
    """Stands for a lost machine."""


def stop_at(step):
    def on_step(run):
        if run.step == step:
            raise StoppedError

    return on_step


# ------------------------------------------------------------------------------------ it learns
@pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS)
def test_the_loss_falls_well_below_the_unigram_line(moe):
    run = tiny.trained(moe, steps=60, batch=8, rate=2e-2)
    corpus = run.corpus
    lines = ngram.reference_losses(corpus.train, corpus.validation, corpus.vocab_size, 2)
    assert run.series.cross_entropy[0] == pytest.approx(lines["uniform"], abs=0.1)
    assert run.series.cross_entropy[-5:].mean() < lines["unigram"] - 0.4
    assert run.evaluations[-1]["loss"] < lines["unigram"] - 0.4


def test_sgd_learns_too():
    run = tiny.trained(FULL, steps=60, batch=8, rate=0.3, optimizer=SGD())
    assert run.evaluations[-1]["loss"] < run.series.cross_entropy[0] - 0.4


def test_the_default_corpus_can_be_trained_on():
    corpus = data.default_corpus(3_000)
    cfg = tiny.model(FULL, vocab_size=corpus.vocab_size)
    run = loop.new_run(corpus, cfg, tiny.training(steps=30))
    loop.train(run, show_progress=False)
    assert run.series.cross_entropy[-1] < run.series.cross_entropy[0] - 0.5


def test_a_float64_run_stays_float64():
    run = tiny.trained(FULL, "float64", steps=2)
    assert {leaf.dtype.name for leaf in tree.leaves((run.params, run.state))} == {"float64"}


# --------------------------------------------------------------------------------- it is repeatable
@pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS)
def test_the_same_seed_gives_the_same_bits(moe):
    assert tiny.same_run(tiny.trained(moe), tiny.trained(moe))


def test_another_seed_gives_other_parameters_batches_and_noise():
    a, b = tiny.run(FULL), tiny.run(FULL, seed=6)
    assert (a.params.token_VC != b.params.token_VC).all()
    for stream in ("data_rng", "noise_rng"):
        first, second = getattr(a, stream), getattr(b, stream)
        assert first.bit_generator.state != second.bit_generator.state
    assert a.data_rng.random() != a.noise_rng.random()


def test_switching_the_noise_off_changes_neither_the_parameters_nor_the_data_order(monkeypatch):
    drawn = []
    sample = data.sample_batch

    def spy(*args):
        drawn.append(sample(*args))
        return drawn[-1]

    monkeypatch.setattr(data, "sample_batch", spy)
    runs, initial = [], []
    for noise in (None, LearnedNoise(), GaussianNoise(), InputJitter()):
        runs.append(tiny.run(tiny.moe(noise=noise)))
        initial.append({n: a.tobytes() for n, a in tree.named_leaves(runs[-1].params)})
        loop.train(runs[-1], show_progress=False)
    batches = [drawn[start : start + 9] for start in range(0, len(drawn), 9)]
    assert len(drawn) == 4 * 9
    for run, parameters, batch in zip(runs[1:], initial[1:], batches[1:], strict=True):
        assert {name: parameters[name] for name in initial[0]} == initial[0]
        assert np.array_equal(batch, batches[0])
        assert not np.array_equal(run.series.cross_entropy, runs[0].series.cross_entropy)


# ---------------------------------------------------------------------------- it stops and goes on
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(moe, optimizer, tmp_path):
    uninterrupted = tiny.trained(moe, optimizer=optimizer)
    for stop in (1, 4, 8):
        run = tiny.run(moe, optimizer=optimizer)
        path = tmp_path / f"{stop}.npz"
        with pytest.raises(StoppedError):
            loop.train(run, path, save_every=stop, show_progress=False, on_step=stop_at(stop))
        resumed = loop.load_run(path, tiny.corpus())
        assert resumed.step == stop
        loop.train(resumed, path, show_progress=False)
        assert tiny.same_run(resumed, uninterrupted)
        assert tiny.same_run(loop.load_run(path, tiny.corpus()), uninterrupted)


def test_a_run_may_stop_between_checkpoints_and_more_than_once(tmp_path):
    path = tmp_path / "run.npz"
    with pytest.raises(StoppedError):
        loop.train(tiny.run(FULL), path, 3, show_progress=False, on_step=stop_at(5))
    run = loop.load_run(path, tiny.corpus())
    assert run.step == 3
    with pytest.raises(StoppedError):
        loop.train(run, path, 3, show_progress=False, on_step=stop_at(7))
    run = loop.load_run(path, tiny.corpus())
    assert run.step == 6
    loop.train(run, path, show_progress=False)
    assert tiny.same_run(run, tiny.trained(FULL))


def test_a_stop_before_the_first_step_loses_nothing(tmp_path):
    path = tmp_path / "run.npz"
    with pytest.raises(StoppedError):
        loop.train(tiny.run(FULL), path, 100, show_progress=False, on_step=stop_at(2))
    run = loop.load_run(path, tiny.corpus())
    assert run.step == 0
    loop.train(run, show_progress=False)
    assert tiny.same_run(run, tiny.trained(FULL))


def test_the_time_of_all_sessions_adds_up(tmp_path, monkeypatch):
    path, ticks = tmp_path / "run.npz", itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(ticks))  # one each step
    run = tiny.run()
    with pytest.raises(StoppedError):
        loop.train(run, path, 4, show_progress=False, on_step=stop_at(5))
    for seconds in (4, 9, 9):  # stopped, resumed, finished and resumed again
        run = loop.load_run(path, tiny.corpus())
        assert run.seconds == seconds
        loop.train(run, path, show_progress=False)
        assert run.seconds == 9


def interrupted(run, path, **kwargs):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        loop.train(run, path, show_progress=False, **kwargs)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_after_a_step_leaves_a_checkpoint_of_that_step(tmp_path):
    run, path = tiny.run(FULL), tmp_path / "run.npz"

    def on_step(run):
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)

    interrupted(run, path, on_step=on_step)
    assert run.step == 4
    resumed = loop.load_run(path, tiny.corpus())
    assert resumed.step == 4
    loop.train(resumed, show_progress=False)
    assert tiny.same_run(resumed, tiny.trained(FULL))


def test_an_interrupt_within_a_step_finishes_the_step(tmp_path, monkeypatch):
    run, path, sample = tiny.run(FULL), tmp_path / "run.npz", data.sample_batch

    def sample_batch(*args):
        if run.step == 3:
            signal.raise_signal(signal.SIGINT)
        return sample(*args)

    monkeypatch.setattr(data, "sample_batch", sample_batch)
    interrupted(run, path)
    assert run.step == 4
    monkeypatch.undo()
    resumed = loop.load_run(path, tiny.corpus())
    assert resumed.step == 4
    loop.train(resumed, show_progress=False)
    assert tiny.same_run(resumed, tiny.trained(FULL))


def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path, monkeypatch):
    def sample_batch(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one did not stop the step")

    monkeypatch.setattr(data, "sample_batch", sample_batch)
    interrupted(tiny.run(), tmp_path / "run.npz")


def test_a_run_can_train_outside_the_main_thread():
    run = tiny.run(steps=2)
    thread = threading.Thread(target=loop.train, args=(run,), kwargs={"show_progress": False})
    thread.start()
    thread.join()
    assert run.step == 2


# --------------------------------------------------------------------------------- it goes wrong
def test_a_loss_that_is_not_a_number_names_the_step_and_spares_the_checkpoint(tmp_path):
    run, path = tiny.run(FULL), tmp_path / "run.npz"
    kept = []

    def poison(run):
        if run.step == 3:
            kept.append(path.read_bytes())
            run.params.token_VC[:] = np.nan

    with pytest.raises(ValueError, match=r"loss must stay finite, got nan at step 4 of 9\. Lower"):
        loop.train(run, path, save_every=2, show_progress=False, on_step=poison)
    assert path.read_bytes() == kept[0]
    resumed = loop.load_run(path, tiny.corpus())
    assert resumed.step == 2
    loop.train(resumed, show_progress=False)
    assert tiny.same_run(resumed, tiny.trained(FULL))


def test_a_gradient_that_is_not_finite_is_told_of_before_it_moves_a_weight(monkeypatch):
    run, gradients = tiny.run(FULL), shards.gradients

    def overflowing(*given):
        report, grads = gradients(*given)
        grads.token_VC[0] = np.inf
        return report, grads

    monkeypatch.setattr(shards, "gradients", overflowing)
    with pytest.raises(ValueError, match="gradient norm must stay finite, got inf at step 1 of 9"):
        loop.train(run, show_progress=False)
    assert run.step == 0 and tiny.same_bits(run.params, tiny.run(FULL).params)


def test_an_interrupt_spares_the_checkpoint_from_weights_that_blew_up(tmp_path):
    run, path = tiny.run(FULL), tmp_path / "run.npz"

    def poison_and_stop(run):
        run.params.token_VC[:] = np.nan
        signal.raise_signal(signal.SIGINT)

    rule = "norm of the weights must stay finite, got nan at step 1"
    with pytest.raises((ValueError, KeyboardInterrupt), match=rule):
        loop.train(run, path, show_progress=False, on_step=poison_and_stop)
    assert loop.load_run(path, tiny.corpus()).step == 0


@pytest.mark.parametrize("rate", [1e30, 1e300])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("save_every", [1, 100])
def test_weights_that_blow_up_are_told_of_and_spare_the_checkpoint(
    rate, steps, save_every, tmp_path
):
    wild = {"rate": rate, "final_rate": rate, "warmup": 0, "clip": None, "optimizer": SGD()}
    path = tmp_path / "run.npz"
    with pytest.raises(ValueError, match="must stay finite"):
        loop.train(tiny.run(FULL, steps=steps, **wild), path, save_every, show_progress=False)
    resumed = loop.load_run(path, tiny.corpus())
    assert resumed.step < steps
    assert all(np.isfinite(leaf).all() for leaf in tree.leaves(resumed.params))


@pytest.mark.parametrize("knob", ["save_every", "evaluate_every", "threads"])
def test_training_refuses_numbers_that_are_not_positive(knob, tmp_path):
    run = tiny.run()
    with pytest.raises(ValueError, match=f"train: {knob} must be .*at least 1, got 0"):
        loop.train(run, tmp_path / "run.npz", show_progress=False, **{knob: 0})
    assert run.step == 0 and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"evaluate: batch must be .*at least 1, got -1"):
        loop.evaluate(run.params, run.cfg, run.corpus.validation, batch=-1)


@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_parameters_are_floats_of_32_or_64_bits(dtype):
    with pytest.raises(
        ValueError, match=f"dtype must be one of 'float32', 'float64', got '{dtype}'"
    ):
        tiny.run(dtype=dtype)


def test_a_run_refuses_a_model_of_another_vocabulary_and_a_text_too_short():
    with pytest.raises(ValueError, match="vocab_size must be that of the corpus"):
        loop.new_run(tiny.corpus(), tiny.model(None, vocab_size=5), tiny.training())
    with pytest.raises(ValueError, match="context"):
        loop.new_run(tiny.corpus(), tiny.model(None, context=2000), tiny.training())


# ------------------------------------------------------------------------------ evaluation, series
def judge_loss(params, cfg, ids):
    """Score every window by itself with a log-softmax in Python floats."""
    nats = []
    for token_T, target_T in zip(*data.windows(ids, cfg.context), strict=True):
        logits_BTV, _, _, _ = model.model_forward(token_T[None], params, cfg.evaluation())
        for logits, target in zip(logits_BTV[0].tolist(), target_T.tolist(), strict=True):
            top = max(logits)
            nats.append(top + math.log(sum(math.exp(z - top) for z in logits)) - logits[target])
    return math.fsum(nats) / len(nats)


def test_an_evaluation_is_the_mean_over_windows_without_noise_and_without_limits():
    run = tiny.trained(FULL, "float64", steps=20)
    ids, bare = run.corpus.validation, tiny.model(tiny.moe(bias_rate=0.01))
    found = loop.evaluate(run.params, run.cfg, ids)
    assert found.loss == pytest.approx(judge_loss(run.params, run.cfg, ids), rel=1e-12)
    params = tree.map(np.copy, run.params)
    again = loop.evaluate(params, run.cfg, ids)
    assert (again.loss, again.wished.tolist()) == (found.loss, found.wished.tolist())
    assert tiny.same_bits(params, run.params)
    assert loop.evaluate(run.params, bare, ids).loss == found.loss
    for batch in (1, 5):
        other = loop.evaluate(run.params, run.cfg, ids, batch)
        assert other.loss == pytest.approx(found.loss, rel=1e-12)
        np.testing.assert_allclose(other.decisiveness, found.decisiveness, rtol=1e-12)
        assert other.wished.tolist() == found.wished.tolist()
    targets = (len(ids) - 1) // 16 * 16
    assert found.wished.sum(1).tolist() == [2 * targets] * 2
    assert ((found.decisiveness >= 0.25) & (found.decisiveness <= 1)).all()


def test_evaluations_come_every_so_many_steps_and_at_the_end():
    steps = {None: [2, 4, 6, 8, 9], 4: [4, 8, 9], 9: [9], 50: [9]}
    for every, expected in steps.items():
        run = tiny.run()
        loop.train(run, evaluate_every=every, show_progress=False)
        assert [e["step"] for e in run.evaluations] == expected
    loss = loop.evaluate(run.params, run.cfg, run.corpus.validation).loss
    assert run.evaluations[-1]["loss"] == loss


@pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS)
def test_the_series_add_up(moe):
    run = tiny.trained(moe)
    series, layers = run.series, 2 if moe else 0
    assert all(len(values) == 9 and np.isfinite(values).all() for values in series)
    assert series.rate.tolist() == [run.training.rate_at(step) for step in range(9)]
    assert series.wished.shape[1] == series.entropy.shape[1] == layers
    if not moe:
        assert not series.aux.any()
        return
    choices = TOKENS * moe.top_k
    assert (series.wished.sum(-1) == choices).all()
    assert (series.load.sum(-1) + series.dropped == choices).all()
    assert series.dropped.any()
    assert series.load.max() <= moe.capacity.places(TOKENS, moe.top_k, 4)
    assert (series.decisiveness >= 0.25).all() and (series.decisiveness <= 1).all()
    assert (series.entropy >= 0).all() and (series.entropy <= math.log(4) + 1e-6).all()
    assert series.aux.all() == bool(moe.balance)


# ------------------------------------------------------------------------------------ bias rule
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_bias_moves_by_its_rule_alone_and_not_by_the_optimizer(optimizer):
    run = tiny.trained(FULL, "float64", optimizer=optimizer)
    for layer, block in enumerate(run.params.blocks):
        expected = np.zeros(4)
        for wished in run.series.wished[:, layer]:
            expected += 0.01 * np.sign(wished.mean() - wished)
        assert expected.any()
        np.testing.assert_allclose(block.feed.router.bias_E, expected, atol=1e-15)
    assert balance.updated_bias(np.zeros(3), np.array([0, 3, 6]), 0.5).tolist() == [0.5, 0, -0.5]


def test_the_series_of_a_fresh_router_say_that_it_is_undecided():
    run = tiny.trained(tiny.moe(), steps=1)
    np.testing.assert_allclose(run.series.entropy, math.log(4), rtol=0.05)
    np.testing.assert_allclose(run.series.decisiveness, 1 / 4, rtol=0.2)


def test_the_hidden_width_of_experts_is_never_zero():
    narrow = settings.DEFAULTS | {"width": 1, "top_k": 8}
    assert settings._moe(narrow).hidden == 1


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_experts_of_a_token_are_four_widths_wide_together(k):
    assert settings._moe(settings.DEFAULTS | {"top_k": k}).hidden == 4 * 64 // k


def test_a_preset_can_be_recomputed():
    assert settings.start({"preset": "switch", "recompute": True}).cfg.recompute
    assert not settings.start({"preset": "switch"}).cfg.recompute


def test_a_choice_among_no_experts_is_refused():
    with pytest.raises(ValueError, match="--top-k must come with experts"):
        settings.start({"experts": 0, "top_k": 2})
