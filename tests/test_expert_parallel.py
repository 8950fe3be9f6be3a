"""Processes that share experts out: the bits of one, memory that is not written twice, an end."""

import contextlib
import contextvars
import copy
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny

from moe_numpy import machine, processes, tree
from moe_numpy.classroom import registry
from moe_numpy.config import (
    Capacity,
    ExpertChoice,
    Hierarchy,
    LearnedNoise,
    Shared,
    SoftSlots,
    SwitchLoss,
)
from moe_numpy.moe import experts, layer, router
from moe_numpy.ops import activation
from moe_numpy.training import expert_parallel, shards
from moe_numpy.transformer import decode, generation, model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such processes")

N, C = 48, 16
LAYERS = {
    "plain": tiny.moe(),
    "gated, with biases": tiny.moe(activation="clamped_swiglu", expert_bias=True),
    "a third branch": tiny.moe(activation="swiglu3"),
    "noise, places, a loss": tiny.moe(
        noise=LearnedNoise(), capacity=Capacity(factor=0.7), balance=(SwitchLoss(),)
    ),
    "gate on the input, shared": tiny.moe(gate_on="input", shared=Shared(hidden=8)),
    "many experts without rows": tiny.moe(num_experts=64, top_k=1),
    "one expert": tiny.moe(num_experts=1, top_k=1),
    "slots": tiny.moe(top_k=4, selection=SoftSlots(slots=3)),
    "a hierarchy": tiny.moe(num_experts=6, selection=Hierarchy(groups=2, kept=1)),
}


def drawn(cfg, dtype="float32", tokens=N):
    """Draw a layer, its noise, tokens and an upstream gradient."""
    rng = np.random.default_rng(7)
    x_NC, dy_NC = rng.standard_normal((2, tokens, C)).astype(dtype)
    params = layer.init_moe(rng, cfg, C, dtype)
    return x_NC, dy_NC, params, router.draw_noise(rng, cfg, tokens, C, dtype)


def both_ways(x_NC, dy_NC, params, cfg, noise):
    y_NC, aux, _, cache = layer.moe_forward(x_NC, params, cfg, noise)
    return y_NC, aux, *layer.moe_backward(dy_NC, np.ones_like(aux), cache)


@contextlib.contextmanager
def parallel(params, rows=2 * N, size=2):
    """Begin the block; yield the parameters and the processes."""
    with expert_parallel.expert_parallel(params, rows, size) as shared:
        yield shared, processes._holders.get()[0]


# ------------------------------------------------------------------------------------------- bits
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_processes_change_no_bit_of_a_layer(name, size, dtype, monkeypatch):
    cfg = LAYERS[name]
    x_NC, dy_NC, params, noise = drawn(cfg, dtype)
    alone = both_ways(x_NC, dy_NC, params, cfg, noise)
    with parallel(params, size=size) as (shared, crew):
        asked, each = [], crew._each
        monkeypatch.setattr(crew, "_each", lambda *a: asked.append(a[0].__name__) or each(*a))
        for paces in ([1 / size] * size, [0.9, *[0.1 / (size - 1)] * (size - 1)]):
            crew.paces = paces
            together = both_ways(x_NC, dy_NC, shared, cfg, noise)
            assert tiny.same_bits(alone, together)
            del together
        assert asked == ["_run", "_undo"] * 2


def test_nor_for_no_tokens_at_all():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg, tokens=0)
    alone = both_ways(x_NC, dy_NC, params, cfg, None)
    with parallel(params) as (shared, _):
        assert tiny.same_bits(alone, both_ways(x_NC, dy_NC, shared, cfg, None))


@pytest.mark.parametrize("recompute", [False, True])
def test_nor_of_a_model_whose_layers_all_share_their_experts_out(recompute):
    cfg = tiny.model(tiny.moe(activation="swiglu", capacity=Capacity(factor=1.0)), layers=3)
    cfg = tiny.without(cfg, recompute=recompute)
    rng = np.random.default_rng(0)
    token_BT, target_BT = rng.integers(0, cfg.vocab_size, (2, 3, 16))
    params = model.init_model(rng, cfg)

    def step(params):
        loss, _, cache = model.loss_forward(token_BT, target_BT, params, cfg)
        return loss, model.loss_backward(np.ones_like(loss), cache)

    alone = step(params)
    with parallel(params) as (shared, crew):
        assert len(crew.layers) == 3
        for _ in range(2):
            assert tiny.same_bits(alone, step(shared))


def test_what_is_written_to_the_parameters_is_seen_by_all():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    with parallel(params) as (shared, _):
        before = both_ways(x_NC, dy_NC, shared, cfg, None)[0]
        for mine, theirs in zip(tree.leaves(params), tree.leaves(shared), strict=True):
            assert not np.shares_memory(mine, theirs)
            mine *= 1.5
            theirs *= 1.5
        after = both_ways(x_NC, dy_NC, shared, cfg, None)
        assert (after[0] != before).any()
        assert tiny.same_bits(after, both_ways(x_NC, dy_NC, params, cfg, None))
    assert tiny.same_bits(after[0], both_ways(x_NC, dy_NC, shared, cfg, None)[0])  # after the end


def test_a_layer_with_other_arrays_is_computed_by_the_caller_alone(monkeypatch):
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    with parallel(params) as (shared, crew):
        monkeypatch.setattr(crew, "_each", lambda *a: pytest.fail("sent to the processes"))
        other = shared.experts._replace(out_EFC=2 * shared.experts.out_EFC)
        found = both_ways(x_NC, dy_NC, shared._replace(experts=other), cfg, None)
        own = params.experts._replace(out_EFC=2 * params.experts.out_EFC)
        judge = both_ways(x_NC, dy_NC, params._replace(experts=own), cfg, None)
        assert tiny.same_bits(found, judge)


def test_blocks_within_blocks_each_have_their_layer():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    other = layer.init_moe(1, cfg, C, "float32")
    alone = [both_ways(x_NC, dy_NC, p, cfg, None) for p in (params, other)]
    with parallel(params) as (first, _), parallel(other) as (second, _):
        assert len(processes._holders.get()) == 2
        for shared, judge in zip((first, second, first), (*alone, alone[0]), strict=True):
            assert tiny.same_bits(judge, both_ways(x_NC, dy_NC, shared, cfg, None))
    assert processes._holders.get() == () and not multiprocessing.active_children()


# ----------------------------------------------------------------------------------------- sharing
def test_the_experts_are_cut_into_runs_of_the_work_that_a_pace_allows():
    rows, M = 10, expert_parallel.MATRICES
    offsets = tuple(range(0, 8 * rows + 1, rows))
    assert expert_parallel._cut(offsets, [0.5, 0.5]) == ([0, 4, 8], [0.5, 0.5])
    assert expert_parallel._cut(offsets, [0.25, 0.5, 0.25])[0] == [0, 2, 6, 8]
    bounds, shares = expert_parallel._cut((0, 3, 90), [0.5, 0.5])  # never both for one member
    assert bounds == [0, 1, 2] and shares[0] == (3 + M) / (90 + 2 * M)
    bounds, shares = expert_parallel._cut((0, 4), [0.4, 0.3, 0.3])
    assert sorted(np.diff(bounds)) == [0, 0, 1] and sum(shares) == 1.0
    bounds, _ = expert_parallel._cut((0,) + (100,) * 8, [0.5, 0.5])  # one has all the rows
    assert bounds == [0, 1, 8]


def test_a_slow_member_gets_less_work_and_an_idle_one_gets_some_again():
    _, _, params, _ = drawn(tiny.moe())
    with parallel(params) as (_, crew):
        for _ in range(20):
            crew._learn([2 * crew.paces[0], crew.paces[1]], crew.paces)  # half the speed
        assert np.allclose(crew.paces, [1 / 3, 2 / 3], atol=1e-3)
        crew.paces = [0.0, 1.0]
        for _ in range(20):
            crew._learn([1e-3, 1.0], [0.0, 1.0])
        assert np.allclose(crew.paces, 0.5, atol=1e-3)


def test_both_ways_teach_the_paces_by_the_work_and_the_time_of_every_member(monkeypatch):
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    with parallel(params) as (shared, crew):
        seen, crew.paces = [], [0.8, 0.2]
        monkeypatch.setattr(crew, "_learn", lambda *lesson: seen.append(lesson))
        both_ways(x_NC, dy_NC, shared, cfg, None)
    (forward, shares), (backward, again) = seen
    assert shares == again and shares[0] > 0.6 and sum(shares) == pytest.approx(1.0)
    assert all(0.0 < seconds < 60.0 for seconds in (*forward, *backward))


def _who(crew, rank):
    return [(os.getpid(), len(crew.kept))]


def test_every_member_keeps_its_part_of_a_cache_as_long_as_the_caller_keeps_the_cache():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    alone = both_ways(x_NC, dy_NC, params, cfg, None)
    with parallel(params) as (shared, crew):
        forward = lambda: layer.moe_forward(x_NC, shared, cfg)  # noqa: E731
        (y_NC, aux, _, first), (_, _, _, second) = forward(), forward()
        assert [held for _, held in crew._each(_who)] == [2, 2]
        assert len({pid for pid, _ in crew._each(_who)}) == 2
        for cache in (second, first, first):  # in any order, and again
            found = layer.moe_backward(dy_NC, np.ones_like(aux), cache)
            assert tiny.same_bits(alone, (y_NC, aux, *found))
            del found
        del first, second, cache
        gc.collect()
        assert len(crew.kept) == 0
        *_, last = forward()  # the others are told with the next order
        assert [held for _, held in crew._each(_who)] == [1, 1]
        *_, fourth = forward()
        del last
        gc.collect()
        layer.moe_backward(dy_NC, np.ones_like(aux), fourth)
        assert [held for _, held in crew._each(_who)] == [1, 1]


@pytest.mark.parametrize("leaf", [0, -1])
def test_gradients_that_are_held_are_not_written_again(leaf):
    cfg = tiny.moe(expert_bias=True)
    x_NC, dy_NC, params, _ = drawn(cfg)
    alone = [both_ways(x, dy_NC, params, cfg, None)[-1] for x in (x_NC, 2 * x_NC)]
    with parallel(params) as (shared, crew):
        backward = lambda x: both_ways(x, dy_NC, shared, cfg, None)[-1]  # noqa: E731
        lent = lambda: [room.is_lent() for room in crew.rooms[0]]  # noqa: E731
        kept = [backward((1 + i % 2) * x_NC) for i in range(6)]  # more than there are rooms
        assert all(tiny.same_bits(grads, alone[i % 2]) for i, grads in enumerate(kept))
        assert lent() == [True, True, False]
        view = tree.leaves(kept[0].experts)[leaf][1:2]
        before = view.copy()
        del kept
        assert lent() == [True, False, False]
        for _ in range(3):
            total = backward(2 * x_NC)
        assert view.tobytes() == before.tobytes() and tiny.same_bits(total, alone[1])
        del view
        assert lent() == [False, True, False]


def test_gradients_of_a_backward_that_failed_leave_room(monkeypatch):
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    with parallel(params) as (shared, crew):
        _, aux, _, cache = layer.moe_forward(x_NC, shared, cfg)
        stored = []
        with monkeypatch.context() as patch:
            patch.setattr(expert_parallel, "_undo", _fail)
            for _ in range(4):
                with pytest.raises(MemoryError) as problem:
                    layer.moe_backward(dy_NC, np.ones_like(aux), cache)
                stored.append(problem.value)
        assert not any(room.is_lent() for room in crew.rooms[0]) and len(stored) == 4


def test_shards_on_threads_take_turns_and_have_their_own_gradients():
    cfg, B = tiny.model(tiny.moe(), layers=2), 8
    rng = np.random.default_rng(0)
    token_BT, target_BT = rng.integers(0, cfg.vocab_size, (2, B, 16))
    params = model.init_model(rng, cfg)
    with machine.workers(1):
        judge = shards.gradients(token_BT, target_BT, params, cfg, shards=4)
    with parallel(params) as (shared, _), ThreadPoolExecutor(1) as pool, machine.sharing(pool, 2):
        found = shards.gradients(token_BT, target_BT, shared, cfg, shards=4)
    assert tiny.same_bits(judge[1], found[1])


def test_threads_of_the_caller_take_turns():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    xs = [(1 + i) * x_NC for i in range(4)]
    judges = [both_ways(x, dy_NC, params, cfg, None) for x in xs]
    right = []

    def work(x, judge):
        for _ in range(30):
            right.append(tiny.same_bits(judge, both_ways(x, dy_NC, shared, cfg, None)))

    pause = sys.getswitchinterval()
    with parallel(params) as (shared, _), ThreadPoolExecutor(4) as pool:
        sys.setswitchinterval(1e-5)
        try:
            run = [contextvars.copy_context().run for _ in xs]
            for done in [
                pool.submit(*job) for job in zip(run, [work] * 4, xs, judges, strict=True)
            ]:
                done.result()
        finally:
            sys.setswitchinterval(pause)
    assert len(right) == 120


# ------------------------------------------------------------------------------------ end, refusals
def _fail(crew, rank, *_):
    if rank == 1:
        raise MemoryError("no room in member 1")
    return [0.0]


def _die(crew, rank, *_):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0]


def test_what_a_member_raises_is_raised_here_and_the_next_call_is_answered(monkeypatch):
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    alone = both_ways(x_NC, dy_NC, params, cfg, None)
    with parallel(params) as (shared, _):
        with monkeypatch.context() as patch:
            patch.setattr(expert_parallel, "_run", _fail)
            with pytest.raises(MemoryError, match="no room in member 1"):
                layer.moe_forward(x_NC, shared, cfg)
        assert tiny.same_bits(alone, both_ways(x_NC, dy_NC, shared, cfg, None))


def test_the_end_of_a_member_is_told_and_leaves_nobody(monkeypatch):
    cfg = tiny.moe()
    x_NC, _, params, _ = drawn(cfg)
    monkeypatch.setattr(expert_parallel, "_run", _die)
    words = r"expert_parallel: every process must answer.*Begin the block anew, with fewer"
    with pytest.raises(ChildProcessError, match=words):
        with parallel(params, size=3) as (shared, _):
            layer.moe_forward(x_NC, shared, cfg)
    assert not multiprocessing.active_children() and processes._holders.get() == ()


def test_after_the_end_the_caller_computes_alone_but_an_old_cache_is_of_no_use():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    alone = both_ways(x_NC, dy_NC, params, cfg, None)
    with parallel(params) as (shared, _):
        _, aux, _, cache = layer.moe_forward(x_NC, shared, cfg)
        within = contextvars.copy_context()
    with pytest.raises(ValueError, match="its processes must be at work, got their end"):
        layer.moe_backward(dy_NC, np.ones_like(aux), cache)
    assert tiny.same_bits(alone, within.run(both_ways, x_NC, dy_NC, shared, cfg, None))


def _interrupt(crew, rank, *_):
    if rank == 0:
        raise KeyboardInterrupt
    return [0.0]


def test_after_an_interrupt_the_caller_computes_alone(monkeypatch):
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    alone = both_ways(x_NC, dy_NC, params, cfg, None)
    with parallel(params) as (shared, crew):
        with monkeypatch.context() as patch:
            patch.setattr(expert_parallel, "_run", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                layer.moe_forward(x_NC, shared, cfg)
        assert not crew.at_work
        assert tiny.same_bits(alone, both_ways(x_NC, dy_NC, shared, cfg, None))


def test_a_process_that_is_forked_within_the_block_computes_alone_and_delays_no_end():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    judges = [both_ways(x, dy_NC, params, cfg, None) for x in (x_NC, 2 * x_NC)]
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def other():
        for _ in range(50):
            assert tiny.same_bits(judges[1], both_ways(2 * x_NC, dy_NC, shared, cfg, None))
        theirs.send("right")
        theirs.recv()  # and has all lines of the block until it is told

    with parallel(params) as (shared, _):
        process = fork.Process(target=other, daemon=True)
        process.start()
        for _ in range(50):
            assert tiny.same_bits(judges[0], both_ways(x_NC, dy_NC, shared, cfg, None))
        assert ours.poll(30) and ours.recv() == "right"
        started = time.monotonic()
    assert time.monotonic() - started < processes.PATIENCE / 2
    ours.send("done")
    process.join()


def test_a_forked_process_cannot_use_what_the_block_keeps():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    alone = both_ways(x_NC, dy_NC, params, cfg, None)
    fork = multiprocessing.get_context("fork")

    def other():
        nonlocal freed
        del freed  # the members are not told of it
        with pytest.raises(ValueError, match="expert_parallel: only the caller of the block may"):
            layer.moe_backward(2 * dy_NC, np.float32(1), cache)
        with pytest.raises(ValueError, match="expert_parallel: only the process that started its"):
            crew._each(_settings)
        crew.__exit__()  # as where an error leaves the block
        theirs.send("right")

    ours, theirs = fork.Pipe()
    with parallel(params) as (shared, crew):
        y_NC, aux, _, freed = layer.moe_forward(x_NC, shared, cfg)
        *_, cache = layer.moe_forward(x_NC, shared, cfg)
        process = fork.Process(target=other)
        process.start()
        process.join(30)
        assert process.exitcode == 0 and ours.recv() == "right"
        for kept in (cache, freed):
            both = y_NC, aux, *layer.moe_backward(dy_NC, np.ones_like(aux), kept)
            assert tiny.same_bits(alone, both)


def test_nothing_is_swapped_while_processes_go_on_with_what_stood_there():
    cfg = tiny.moe()
    x_NC, _, params, _ = drawn(cfg)
    y_NC, *_ = layer.moe_forward(x_NC, params, cfg)
    doubled = lambda x: tuple(2 * a if i == 0 else a for i, a in enumerate(gelu(x)))  # noqa: E731
    gelu = activation.gelu_tanh_forward
    with parallel(params) as (shared, _):
        with pytest.raises(ValueError, match="swap: no processes may be at work, got some"):
            with registry.swap("gelu_tanh_forward", doubled):
                pass
        assert activation.gelu_tanh_forward is gelu
        assert (layer.moe_forward(x_NC, shared, cfg)[0] == y_NC).all()
    with registry.swap("gelu_tanh_forward", doubled), parallel(params) as (shared, _):
        assert np.allclose(layer.moe_forward(x_NC, shared, cfg)[0], 2 * y_NC)


def test_what_is_wrapped_around_the_experts_happens_once_not_in_the_members_too():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    forward, backward = experts.experts_forward, experts.experts_backward

    def double(*given):
        y_RC, cache = forward(*given)
        return 2 * y_RC, cache

    def turn(dy_RC, cache):
        dx_RC, grads = backward(dy_RC, cache)
        return -dx_RC, grads

    with registry.swap("experts_forward", double), registry.swap("experts_backward", turn):
        alone = both_ways(x_NC, dy_NC, params, cfg, None)
        with parallel(params) as (shared, _):
            assert tiny.same_bits(both_ways(x_NC, dy_NC, shared, cfg, None), alone)


def test_generation_shares_nothing_out_however_many_rows_it_has():
    cfg = tiny.model(tiny.moe())
    params = model.init_model(0, cfg)
    prompt = np.arange(decode.SHORT + 2) % cfg.vocab_size
    written = list(generation.generate(prompt, params, cfg, 2 * cfg.context, 0))
    with expert_parallel.expert_parallel(params, 1, 2) as shared:
        assert list(generation.generate(prompt, shared, cfg, 2 * cfg.context, 0)) == written


def _settings(crew, rank):
    return [np.geterr()["over"]]


def test_numpys_settings_hold_in_the_members_too():
    _, _, params, _ = drawn(tiny.moe())
    with parallel(params, size=3) as (_, crew):
        for setting in ("raise", "ignore"):
            with np.errstate(over=setting):
                assert crew._each(_settings) == [setting] * 3


def test_a_cache_cannot_be_copied():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    alone = both_ways(x_NC, dy_NC, params, cfg, None)
    with parallel(params) as (shared, _):
        *_, cache = layer.moe_forward(x_NC, shared, cfg)
        with pytest.raises(TypeError, match="expert_parallel: a cache of the block can neither"):
            copy.deepcopy(cache)
        assert tiny.same_bits(alone, both_ways(x_NC, dy_NC, shared, cfg, None))


def test_rows_that_do_not_fit_are_refused_and_not_converted():
    cfg = tiny.moe()
    _, _, params, _ = drawn(cfg)
    offsets = (0, 2, 4, 6, 8)
    with parallel(params) as (shared, crew):
        for dy_RC in (np.ones((1, C), "f"), np.ones((8, C))):
            _, cache = experts.experts_forward(np.ones((8, C), "f"), shared.experts, cfg, offsets)
            with pytest.raises(ValueError, match=r"the rows must be \(8, 16\) of float32, got"):
                experts.experts_backward(dy_RC, cache)
        del cache  # the refused calls have not forgotten what is freed
        _, _last = experts.experts_forward(np.ones((8, C), "f"), shared.experts, cfg, offsets)
        assert [held for _, held in crew._each(_who)] == [1, 1]


def test_more_rows_than_there_is_room_for_are_refused():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    with parallel(params, rows=2 * N - 1) as (shared, _):
        with pytest.raises(
            ValueError, match=r"must send at most 95 rows, got 96\. Begin the block"
        ):
            layer.moe_forward(x_NC, shared, cfg)
        judge = both_ways(x_NC[1:], dy_NC[1:], params, cfg, None)
        assert tiny.same_bits(judge, both_ways(x_NC[1:], dy_NC[1:], shared, cfg, None))


@pytest.mark.parametrize(
    ("rows", "size", "words"),
    [
        (96, 1, "expert_parallel: processes must be a whole number of at least 2, got 1"),
        (0, 2, "expert_parallel: rows must be a whole number of at least 1, got 0"),
        (96, 2.0, r"processes must be a whole number of at least 2, got 2\.0"),
    ],
)
def test_impossible_numbers_are_refused(rows, size, words):
    _, _, params, _ = drawn(tiny.moe())
    with pytest.raises(ValueError, match=words), parallel(params, rows, size):
        pass


def test_layers_of_several_types_are_refused_and_of_several_widths_are_not():
    cfg = tiny.moe()
    x_NC, dy_NC, params, _ = drawn(cfg)
    with pytest.raises(
        ValueError, match="all experts must be of one type, got float32 and float64"
    ):
        with parallel((params, drawn(cfg, "float64")[2])):
            pass
    narrow = layer.init_moe(0, cfg, C // 2, "float32")
    with parallel((narrow, params)) as ((_, shared), _):
        judge = both_ways(x_NC, dy_NC, params, cfg, None)
        assert tiny.same_bits(judge, both_ways(x_NC, dy_NC, shared, cfg, None))


def test_the_rows_of_expert_choice_are_rounded_up_to_a_multiple_of_the_experts():
    cfg = tiny.moe(selection=ExpertChoice())
    x_NC, dy_NC, params, _ = drawn(cfg, tokens=47)
    judge = both_ways(x_NC, dy_NC, params, cfg, None)
    with parallel(params, rows=96) as (shared, _):  # 2 * 47, rounded up
        assert tiny.same_bits(judge, both_ways(x_NC, dy_NC, shared, cfg, None))


def test_parameters_without_experts_and_other_systems_are_refused(monkeypatch):
    dense = model.init_model(np.random.default_rng(0), tiny.model())
    with pytest.raises(ValueError, match="the parameters must have experts, got none"):
        with parallel(dense):
            pass
    _, _, params, _ = drawn(tiny.moe())
    monkeypatch.setattr(processes, "few_launches", lambda: True)
    with pytest.raises(ValueError, match="on Linux, got a run on the GPU"), parallel(params):
        pass
    assert not multiprocessing.active_children()


def test_half_of_what_a_call_has_shown_of_the_paces_is_believed():
    crew = expert_parallel._Crew.__new__(expert_parallel._Crew)
    crew.size, crew.paces = 2, [0.5, 0.5]
    crew._learn([3.0, 1.0], [0.5, 0.5])
    assert crew.paces == pytest.approx([0.375, 0.625])  # between a half and a quarter


def test_the_end_of_the_block_waits_for_a_layer_in_another_thread():
    params, seen = layer.init_moe(0, tiny.moe(), 4, "float64"), []
    with ThreadPoolExecutor(1) as pool:
        with expert_parallel.expert_parallel(params, 8, 2):
            [crew] = processes._holders.get()
            held, go = threading.Event(), threading.Event()

            def work():
                with crew._lock:
                    held.set()
                    go.wait()
                    time.sleep(0.1)
                    seen.append(crew.at_work)

            busy = pool.submit(work)
            held.wait()
            go.set()
        busy.result()
    assert seen == [True]


def test_ctrl_c_does_not_end_the_members():
    params, cfg = layer.init_moe(0, tiny.moe(), 4, "float64"), tiny.moe()
    x_NC = np.ones((4, 4))
    with expert_parallel.expert_parallel(params, 8, 2) as shared:
        [member] = multiprocessing.active_children()
        layer.moe_forward(x_NC, shared, cfg)
        os.kill(member.pid, signal.SIGINT)
        time.sleep(0.05)
        layer.moe_forward(x_NC, shared, cfg)
        assert member.is_alive()
