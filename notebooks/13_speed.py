# %% [markdown]
# # 13 What made it fast
#
# Plain NumPy is thought of as slow. This page goes through what made the package's training steps
# fast, one optimization after the other: the idea, a small calculation or check that you can run,
# and the gain that was measured on an AMD EPYC. There the steps are clearly faster than PyTorch's,
# but much of that is a gift: NumPy's library of matrix products is, by its median, more than twice
# as fast there as PyTorch's. On an Intel Xeon, an older version of the package was about as fast as
# PyTorch, some steps a little slower and the Mixtral step faster. (The races are in the README.)
#
# **After this page you can**
#
# - say which part of a training step no optimization can take away;
# - explain each optimization, and why it changes no result (or which one changes it);
# - read a measured gain with its spread, and tell it from noise.
#
# **Builds on** chapter 06 (dispatch and combine); it helps to know attention, GELU and AdamW.
# (The model called Mixtral has gated experts, the best 2 of 8 for each token.) **Time** about 25
# minutes of reading, and 15 more for the exercise; the cells run in seconds. **The key moment**
# is section 9: what could *not* be shown to help.

# %%
# %matplotlib inline
import sys

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

from moe_numpy import files
from moe_numpy.classroom import exercises_13, registry
from moe_numpy.config import MoEConfig
from moe_numpy.lab import bench, bench_pictures, bench_report, pictures
from moe_numpy.lab.rich_get_richer import FIGURES
from moe_numpy.moe import experts, layer
from moe_numpy.ops import activation, rows
from moe_numpy.training import expert_parallel

# %%
rng = np.random.default_rng(0)
pictures.use_small_png()
plt.rcParams.update({"figure.dpi": 88, "figure.constrained_layout.use": True})
races = files.read_json(FIGURES / "speed.json")
removals = files.read_json(FIGURES / "speed_steps.json")

# %% [markdown]
# ## Predict first
#
# 1. A training step multiplies matrices, and does much else: norms, softmaxes, activations, the
#    optimizer. What share of its time do the matrix products take?
# 2. Two cores train one model. Which is better: both work on each product together, or each works
#    on its own half of the batch? And which gains more, that choice, or numbers of half the size
#    (float32 for float64)?
# 3. An optimizer that works on small blocks, which stay in the cache, should be faster than one
#    that runs over whole arrays a dozen times. How much?

# %% [markdown]
# ## 1. How the gains were measured
#
# Each optimization is switched off by itself, with what depends on it (sections 4, 6, 7 and 8 say
# what), and everything else stays. The programs take turns on the same machine: complete, without
# the first, without the second and so on, then the next round. The **gain** of a round is the time
# without it over the time of the complete program: 2 means twice as fast, 1 means no difference. Of
# all rounds we print the median gain and, in parentheses, the smallest and the largest. A spread
# that includes 1 proves nothing.
#
# The numbers below were read from a record of one machine. `python -m moe_numpy bench` measures
# yours.

# %%
print(bench_report.machine_line(removals))
print("rounds:", *sorted({row["rounds"] for row in removals["rows"]}))
models = dict(zip(bench_report.row_names(removals), removals["rows"], strict=True))
wide = max(map(len, models))


def show(step):
    print(bench.STEPS[step])
    for name, row in models.items():
        found = bench_report.gain(row, step)
        if found:
            spread = f"({found['low']:.2f} to {found['high']:.2f})"
            print(f"    {name:{wide}} {found['median']:5.2f} {spread}")


# %% [markdown]
# Three models were measured in training (all with 4 layers of width 128: a dense one, one with
# experts, and a Mixtral-like one with gated experts), one MoE layer alone with 128 experts, an
# update of experts of which few received a token, and the Mixtral-like model while it writes text.
#
# ## 2. The limit: matrix products
#
# NumPy hands its matrix products to a library that is written for nothing else (here OpenBLAS).
# Given their shapes, their type and the number of threads, nothing in Python can make them faster:
# they are the limit. (Section 3 changes the type, section 6 the threads, section 7 the shapes.) How
# far from it is a step? The benchmark notes every product of a step, and repeats them alone.

# %%
for row in races["rows"]:
    if row["row"] == "step":
        found = row["products"]
        share, over = found["share"], found["step_over_products"]
        print(
            f"{row['name']:8} {found['calls']:4} products: {share['median']:.0%} "
            f"({share['low']:.0%} to {share['high']:.0%}) of the step, which takes "
            f"{over['median']:.2f} times as long ({over['low']:.2f} to {over['high']:.2f})"
        )
        if row.get("narrow"):
            over = row["narrow"]["step_over_products"]
            print(
                f"{'':8} with kernels for AVX2 {over['median']:.2f} times as long "
                f"({over['low']:.2f} to {over['high']:.2f})"
            )

# %% [markdown]
# So if everything else cost nothing, a step would be faster by about that factor, and by no more.
# (A share above 100 % cannot be. It comes from a round in which something disturbed the products
# alone, and slowed them down more than the steps beside them. The medians do not mind.)
#
# The last line of each model is the same step with older kernels (the inner loops of the library),
# for registers of half the width. Its products take longer, everything else takes as long as
# before: so the factor is smaller. The faster the products, the more the rest matters (Amdahl
# 1967).
#
# Much of what follows is about keeping "everything else" small, the rest about giving the library
# products that it likes.
#
# ## 3. Numbers of half the size
#
# A processor adds and multiplies whole registers at once. A register of 512 bits holds 16 numbers
# of 32 bits, but only 8 of 64 bits; and each number that comes from memory takes half the bytes.
# One float64 array among the operands is enough to make NumPy compute in float64, so **one**
# careless array, such as noise from `rng.standard_normal(shape)`, slows down everything after it.

# %%
print((np.ones(3, "float32") * np.ones(3)).dtype, (np.ones(3, "float32") * 2.0).dtype)
show("float32")

# %% [markdown]
# A Python number such as `2.0` does no harm; an array (or a NumPy number) of float64 does.
#
# ## 4. Rows sorted by expert
#
# The experts want different numbers of tokens. A batched product needs the same number for each, so
# it **pads**: every expert gets as many places as the busiest one. The package sorts the rows by
# expert instead; the rows of one expert are then a *slice*, and each product is as large as needed.

# %%
cfg = MoEConfig(num_experts=8, top_k=2, hidden=256)
params = layer.init_moe(rng, cfg, 128, "float32")
x_NC = rng.standard_normal((384, 128), dtype="float32")
y_NC, _, report, cache = layer.moe_forward(x_NC, params, cfg)
needed, padded = report.load_E.sum(), cfg.num_experts * report.load_E.max()
print("rows of each expert:", report.load_E)
print(f"rows in slices: {needed}, rows with padding: {padded}, {padded / needed:.2f} times as many")
show("slices")

# %% [markdown]
# That was a layer whose router is new. The more uneven the counts, the more there is to pad: with
# top-2 of eight experts, a router that always takes the same two pads fourfold. And beside the
# larger products, the padded rows must be copied to their places and back. (Without slices, the
# small pieces of section 7 are gone as well: in the layer of 128 experts the gain of slices
# contains theirs.)
#
# ### The way back is a look-up, too
#
# In the backward, a token's gradient is the sum over its copies,
# $dx_{NC}[n] = \sum_k dx_{RC}[slot_{NK}[n, k]]$. "Add each row to where it belongs" is `np.add.at`,
# a loop over numbers. But every token knows its rows (at most $k$), so it can *fetch* them, one
# indexing expression, and add them up.


# %%
def scatter(dx_RC, cache):
    (plan,) = cache
    dx_NC = np.zeros((plan.slot_NK.shape[0], dx_RC.shape[1]), dx_RC.dtype)
    np.add.at(dx_NC, plan.token_R, dx_RC)
    return dx_NC


dy_NC, daux = rng.standard_normal((384, 128), dtype="float32"), np.zeros((), "float32")
fetched, _ = layer.moe_backward(dy_NC, daux, cache)
with registry.swap("dispatch_backward", scatter):
    scattered, _ = layer.moe_backward(dy_NC, daux, layer.moe_forward(x_NC, params, cfg)[-1])
print("equal to rounding:", np.allclose(fetched, scattered, atol=1e-5))
show("gather")

# %% [markdown]
# `registry.swap` puts another function in the place of one of the package's, for as long as the
# block lasts. This is how the benchmark switches off an optimization, and how you can try your own.
#
# ## 5. Memory that stays, and memory that is near
#
# A step makes and drops hundreds of arrays. What is free at the end of its memory, the C library
# gives back to the operating system, and the next array must ask for it again, page by page, each
# page filled with zeros first. `machine.keep_memory` asks the C library to keep what is free. (It
# also learns from the sizes that it has seen, and may then keep enough by itself: the gain differs
# from model to model.)

# %%
show("memory")

# %% [markdown]
# A core computes far faster than memory delivers, and keeps what it used last in a **cache**: about
# a megabyte that is fast, and more that is slower. GELU takes about a dozen passes, over several
# arrays of one size. Over large arrays, every pass waits for memory; over *blocks* that fit into
# the cache together, only the first one does. So the passes run block by block (`rows.in_blocks`).
# The slope that the backward needs is worked out in the same visit, while everything is at hand.

# %%
numbers = 12 * 64 * 512  # of 12 sequences of 64 tokens; a shard of section 6 has half of them
print(
    f"{numbers * 4 / 2**20:.1f} MiB in an array of hidden units, "
    f"{rows.BLOCK * 4 / 2**20:.2f} MiB in a block"
)
h, (slope,) = activation.gelu_tanh_forward(np.linspace(-2, 2, 5, dtype="float32"))
print("GELU", h.round(3), "slope", slope.round(3))
show("activations")

# %% [markdown]
# AdamW takes a dozen passes, too, over parameters, gradients and two averages; so it works through
# every array in blocks. And reductions: NumPy's own sum of short rows loses most of its time
# between the rows. `rows.sums` is a matrix product with a column of ones instead, `rows.dots` is
# `np.einsum`, `rows.maximum` an argmax and a look-up.

# %%
x = rng.standard_normal((384, 128), dtype="float32")
print("equal to rounding:", np.allclose(rows.sums(x), x.sum(-1, keepdims=True), atol=1e-4))
show("blocks")
show("rows")

# %% [markdown]
# ## 6. Two cores
#
# The library can share one product between cores. For small products that is mostly waiting: the
# cores meet after every one of them. The other idea is to give each core its own part of the batch,
# a **shard**: they meet a few times a step, to add up the gradients and to share out the
# optimizer's work. (Measured with a process for each shard: the gain contains that of the processes
# below.)

# %%
show("shards")

# %% [markdown]
# Threads of one Python process still wait for each other: between NumPy's calls only one of them
# may run Python. Processes do not, at the price of copying gradients through shared memory.

# %%
show("processes")
print("leaves for shards on threads (ratio of the medians):")
for name, row in models.items():
    gains = [bench_report.gain(row, step) for step in ("shards", "processes")]
    if all(gains):
        print(f"    {name:{wide}} {gains[0]['median'] / gains[1]['median']:5.2f}")

# %% [markdown]
# Read the last lines: what is left is the gain of shards that threads compute. Where it is near 1,
# the idea pays only together with processes: what the threads save by meeting less often, they lose
# by waiting for each other's Python.
#
# **Shards change the function.** Each is routed by itself, so capacity limits and balance losses
# see one shard at a time. That is why their number is part of the configuration. Who computes them,
# threads or processes, makes not one bit of difference.
#
# ## 7. Layers with many experts
#
# In the layer of 128 experts, each has about 16 rows. Its product is so small that the library's
# preparations (it first copies the matrices into an order of its own) are a large part of the work.
# Smaller pieces of the matrix skip these preparations. (OpenBLAS's kernels for AVX-512 skip them;
# those for AVX2, which older processors need, prepare everything. Both were measured.)

# %%
few = (rng.standard_normal((64, 128)).astype("float32"), np.arange(0, 65, 16))  # 16 rows each
w_EIO = rng.standard_normal((4, 128, 512)).astype("float32")
in_parts, _ = experts.grouped_linear_forward(few[0], w_EIO, tuple(few[1].tolist()))
plainly = np.concatenate([few[0][16 * e : 16 * e + 16] @ w_EIO[e] for e in range(4)])
print("equal to rounding:", np.allclose(in_parts, plainly, atol=1e-4))
show("few")

# %% [markdown]
# With two cores there is a choice again: they meet in every small product, or they share out whole
# experts. Threads that do so wait for each other's Python after every product, and with so many
# small ones that is often. So processes do it: this is **expert parallelism**. The caller routes
# and dispatches; then each process runs the MLPs of its own experts, on the rows that were sent to
# them, and puts down the results; the caller combines. Matrices, rows and gradients lie in memory
# that the processes share. (Between machines, that share nothing, the rows travel: Lepikhin et al.
# 2020, *GShard*.) The layer is told nothing of it, and no bit of its result depends on who ran an
# expert.

# %%
if sys.platform == "linux":  # where processes can share memory
    with expert_parallel.expert_parallel(params, rows=2 * len(x_NC), size=2) as shared:
        together, *_ = layer.moe_forward(x_NC, shared, cfg)
    print("equal to rounding:", np.allclose(together, y_NC, atol=1e-5))
show("experts")
show("parallel")

# %% [markdown]
# (The first gain contains the second. "To rounding", as a product that two threads share is rounded
# in another way than one on a single thread.)
#
# What remains is the cost of the matrices themselves. An expert without tokens is not multiplied,
# but its gradient is an array of zeros all the same, which must be written, and read by the
# optimizer. `AdamW(skip_idle=True)` (`train --skip-idle`) leaves such experts alone, and its
# docstring says how its mathematics then differs.

# %%
show("idle")

# %% [markdown]
# The zeros are still written, and read once to find out who is idle. With thousands of experts and
# few tokens that is most of the work, and it grows with all the matrices, not only those in use.
#
# ## 8. Writing text
#
# To write token number $t$, the model needs the keys and values of all tokens before it. They do
# not change, so they are kept (the **KV cache**); without it, every token costs a pass over the
# whole text. For a single token, everything but the matrices is tiny, and the *calls* cost more
# than the arithmetic: `decode.py` is the same forward in as few calls as possible.

# %%
prompt, T = bench.PROMPT, bench.WRITTEN
without, kept = sum(range(prompt, prompt + T)), prompt + T - 1
print(f"rows through the model for {T} tokens: {without} without a cache, {kept} with it")
for step in bench.OF_GENERATION:
    show(step)

# %% [markdown]
# The gain is smaller than the ratio of the rows: many rows in one product cost less each than a row
# alone. And the two are not independent: without the cache there is no "single token" either, so
# the first gain contains the second.
#
# ## 9. What could not be shown to help
#
# Some ideas are in the code although their gain is not certain at these sizes. The record says
# which: here is every gain whose spread includes 1. It may be there, or not.

# %%
for name, row in models.items():
    for step in row["steps"]:
        found = bench_report.gain(row, step)
        if found["low"] <= 1 <= found["high"]:
            spread = f"({found['low']:.3f} to {found['high']:.3f})"
            print(f"{bench.STEPS[step]}\n    {name:{wide}} {found['median']:5.2f} {spread}")

# %% [markdown]
# Blocks in the optimizer keep its temporaries small, whatever the size of the largest array, and
# that is why they stay; `rows.sums` is as short to write as NumPy's own sum. Neither is kept for
# its speed. What has no gain in one model may have one in another: look for its other rows above.
# An idea can be right, and its part of a step too small to show: by itself, `np.add.at` takes many
# times as long as the look-up (measure it, with `%timeit`). Where a median is well above 1, a
# quieter machine may decide; more rounds alone can only widen such a spread. Until then, do not
# build on it.
#
# And not everything has a row: how attention avoids copies, that a backward frees what it has used,
# and recomputation (`train --recompute`: less memory, more time) were not measured here.
#
# **Your predictions.** The first is answered in section 2. For the other two, once more the gains
# of giving each core its own half, of float32, and of an optimizer in blocks:

# %%
for step in ("shards", "float32", "blocks"):
    show(step)

# %% [markdown]
# ## 10. The picture

# %%
display(bench_pictures.steps_figure(removals))

# %% [markdown]
# ## Exercise
#
# Your turn: write `dots`, the scalar product of each row of `x` with the same row of `y`. They have
# the same shape, `(..., C)` with any number of axes; the answer has the shape `(..., 1)` and their
# type. The cell checks it, puts it in the place of the package's, and looks at the gradient of a
# layer. Find more than one way, then measure them: `%timeit` in a cell of your own. Which of yours
# is the faster one for rows of 16 numbers, which for rows of 4,096, if both arrays have 65,536?


# %%
def my_dots(x, y):
    raise NotImplementedError("replace this line")


verdict = exercises_13.check_dots(my_dots)
print(verdict)
if verdict.startswith("right"):
    with registry.swap("dots", my_dots):
        _, grads = layer.moe_backward(dy_NC, daux, layer.moe_forward(x_NC, params, cfg)[-1])
    mine, theirs = grads.router.w_CE, layer.moe_backward(dy_NC, daux, cache)[1].router.w_CE
    print("a layer's gradient with it, equal to rounding:", np.allclose(mine, theirs, atol=1e-5))

# %% [markdown]
# <details><summary>What to look for</summary><code>(x * y).sum(-1, keepdims=True)</code> writes
# all products to memory and reads them again, and then NumPy begins every row anew:
# with short rows that beginning is most of the time. <code>np.einsum</code> adds up while it
# multiplies. So the short rows should tell the ways apart more than the long ones. If your times
# say something else, believe them, and ask why.</details>
#
# ## Where to go next
#
# - `python -m moe_numpy bench` measures all this on your machine, and beside PyTorch if you install
#   the extra `bench`. Take away what runs beside it: noise is the enemy of small gains.
# - `tests/benchmarks/plain.py` holds the plain twins of the optimized functions. They are the
#   judges: the tests compare both. `ablation_worker.py` beside it switches off all the rest.
# - Gale et al. 2022, *MegaBlocks*, makes the same point about padding on a GPU.
