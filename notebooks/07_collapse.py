# %% [markdown]
# # 07 Collapse
#
# A router that is left alone can send nearly all tokens to a few experts. The others then learn
# nothing, and the model pays for parameters that it never uses. This chapter shows why that
# happens, measures it, and finds out when it does *not* happen.
#
# **After this chapter you can**
#
# - derive the gradient of a top-1 router and say which expert it pushes up, and when;
# - define collapse by a number, and compute that number by hand;
# - tell a balanced router from a healthy one;
# - tell what a cure does to the *load in training* from what it does to the *choice of the router*.
#
# **Builds on** chapter 06 (top-k gates and their gradients). **Time** about 45 minutes of
# reading, and 45 more for the exercises; the cells run in seconds. **The key moment** is the
# picture of eight experts in their first hundred steps, and, soon after, the same layer on
# another task that does not collapse.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from moe_numpy import files
from moe_numpy.classroom import exercises_07
from moe_numpy.lab import collapse, metrics, plots, rich_get_richer
from moe_numpy.lab import collapse_pictures as pictures
from moe_numpy.lab import pictures as grids
from moe_numpy.moe import balance, router
from moe_numpy.ops import softmax

# %%
grids.use_small_png()
plt.rcParams.update({"figure.dpi": 88, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Predict first
#
# Write your answers down before you read on. They cost a minute, and being wrong is the point.
#
# 1. Eight experts start with small random weights. A top-1 router sends every token to one of
#    them. All tokens need the same job done. After a hundred steps, how many experts still work?
# 2. Now there are eight kinds of tokens, each with a job of its own. How many now?
# 3. A router spreads the tokens over its experts *perfectly evenly*. Is it a good router?

# %% [markdown]
# ## 1. Why a top-1 router feeds itself
#
# There are $N$ tokens and $E$ experts. The router gives each token a row of **logits**, and a
# softmax makes **probabilities** of them: `prob[n, e]`, shape $(N, E)$, each row adding up to 1.
# Top-1 chooses the best expert of the token, which we call $a$ (the one that is *asked*; it depends
# on $n$).
# With a **raw** gate the expert's output $o$, a vector of $C$ numbers, is multiplied by the chosen
# probability:
#
# $$ \mathit{gate}[n] = \mathit{prob}[n, a], \qquad y[n] = \mathit{gate}[n] \; o[n] . $$
#
# Training makes the loss $L$ smaller. Write $dy[n]$ for the gradient of $L$ with respect to $y[n]$.
# The chain rule takes us back to the logits, one line after the other.
#
# **From $y$ to the gate.** $y$ is the gate times $o$, so the derivative is a scalar product:
#
# $$ u[n] = \frac{\partial L}{\partial \mathit{gate}[n]} = o[n] \cdot dy[n] . $$
#
# (Chapter 06 calls it `dgate`; what is called $u$ there is something else.)
#
# **From the gate to the probabilities.** Only $\mathit{prob}[n, a]$ was read. It gets $u[n]$; the
# others get 0.
#
# **From the probabilities to the logits.** For a softmax, $\partial \mathit{prob}[n,a] / \partial
# \mathit{logit}[n,j] = \mathit{prob}[n,a] \, ([j = a] - \mathit{prob}[n,j])$, where $[j = a]$ is
# 1 if $j = a$ and 0 otherwise. Multiply by $u[n]$:
#
# $$ \frac{\partial L}{\partial \mathit{logit}[n,a]}
#      = u[n] \, \mathit{prob}[n,a] \, (1 - \mathit{prob}[n,a]), \qquad
#    \frac{\partial L}{\partial \mathit{logit}[n,j]}
#      = -u[n] \, \mathit{prob}[n,a] \, \mathit{prob}[n,j] \quad (j \neq a). $$
#
# **Read the signs.** Gradient descent moves *against* the gradient. If $u[n] < 0$, so that a larger
# gate would lower the loss, the chosen logit **rises and every other logit falls**, although no
# other expert was tried on this token. If $u[n] > 0$, it is the other way round.

# %%
figure, ax = plt.subplots(figsize=(6.2, 2.8))
ax = pictures.plot_push(ax)

# %% [markdown]
# The two curves mirror each other: what the winner gains, the others lose. The push is weak when
# the router is sure (right end), and also when the gate is small (left end; the gate of a chosen
# expert is never below $1/E$).
#
# ### The same with loops
#
# Three tokens, three experts. We make up the logits and $u$: the first two tokens are served well
# ($u < 0$), the third is served badly ($u > 0$).

# %%
logit_NE = np.array([[0.2, 0.0, -0.2], [0.5, 0.1, 0.0], [0.3, 0.1, 0.2]])
u_N = np.array([-1.0, -0.5, 0.4])
dlogit_NE = np.zeros((3, 3))
for n in range(3):
    total = sum(np.exp(logit_NE[n, j]) for j in range(3))
    prob = [float(np.exp(logit_NE[n, j]) / total) for j in range(3)]
    a = max(range(3), key=lambda j: prob[j])  # the chosen expert
    print(f"token {n}: prob {np.round(prob, 3)}, chosen expert {a}, u = {u_N[n]:+.1f}")
    for j in range(3):
        dlogit_NE[n, j] = u_N[n] * prob[a] * ((j == a) - prob[j])
        way = "down" if dlogit_NE[n, j] > 0 else "up"
        print(f"    expert {j}: dlogit = {dlogit_NE[n, j]:+.4f}, so its logit moves {way}")

# %% [markdown]
# ### The package's version
#
# `raw_gate_backward` puts $u$ where the gate was read, `softmax_backward` does the last line.
# `dgate_NK` has shape $(N, K)$ with $K = 1$ choice for each token.

# %%
prob_NE, prob_cache = softmax.softmax_forward(logit_NE)
expert_NK = router.top_k(logit_NE, 1)
gate_NK, gate_cache = router.raw_gate_forward(prob_NE, expert_NK)
dprob_NE = router.raw_gate_backward(u_N[:, None], gate_cache)
package_NE = softmax.softmax_backward(dprob_NE, prob_cache)
assert np.allclose(package_NE, dlogit_NE, rtol=1e-12)
print("package and loops agree; largest difference", np.abs(package_NE - dlogit_NE).max())

figure, axes = plt.subplots(1, 2, figsize=(7, 2.9))
titles = {"dprob: only the chosen entry": dprob_NE, "-dlogit: how the logits move": -package_NE}
for ax, (title, values_NE) in zip(axes, titles.items(), strict=True):
    grids.plot_grid(ax, values_NE, title)

# %% [markdown]
# Rows 0 and 1 lift the chosen expert 0 and push the others down. Row 2 pushes expert 0 down:
# **a top-1 router does not always reward the winner.** It rewards an expert whose output helps.
#
# ### Why the winner's output soon helps
#
# At the start the output $o$ is random, so $u = o \cdot dy$ is below zero for about half of the
# tokens. Then the expert takes one step. Let its last layer be $o = h W$, with hidden units $h$ and
# a matrix $W$, and let the learning rate be $\eta$:
#
# $$ dW = h^T (\mathit{gate} \; dy) \qquad \text{since } y = \mathit{gate} \; h W, $$
# $$ W_{\mathit{new}} = W - \eta \, \mathit{gate} \, h^T dy \qquad \text{one step down}, $$
# $$ o_{\mathit{new}} = h W_{\mathit{new}} = o - \eta \, \mathit{gate} \, |h|^2 \, dy
#    \qquad \text{for the same token}, $$
# $$ u_{\mathit{new}} = o_{\mathit{new}} \cdot dy
#    = u - \eta \, \mathit{gate} \, |h|^2 \, |dy|^2 \qquad
#    \text{with the same } dy . $$
#
# The last term is never positive. For another token, with hidden units $h'$ and gradient $dy'$,
# the same step changes $u'$ by $- \eta \, \mathit{gate} \, (h \cdot h') (dy \cdot dy')$.
# **Serving a token makes $u$ smaller for that token and for all that are like it**: alike in $h$,
# and needing a similar change.
#
# The router passes its pushes on as well. Its logit is $x \cdot w_e$, with one column $w_e$ for
# each expert, so a token pulls the column by $\mathit{dlogit}[e] \, x$, and the step changes the
# logit of another token $x'$ by $- \eta \, \mathit{dlogit}[e] \, (x \cdot x')$. If the vectors of
# all tokens have a direction in common, **a push for one token is a push for nearly all**.
#
# That closes the loop: being chosen, the expert learns; having learned, it has $u < 0$;
# with $u < 0$ its logit rises and all others fall; so it is chosen again. The matrices of an expert
# that no token chose get no gradient at all; only its logit is moved, and here it falls. Here are
# the formulas in numbers.

# %%
rng = np.random.default_rng(0)
h, W = rng.standard_normal(4), 0.1 * rng.standard_normal((4, 3))  # hidden units; (4, C) with C = 3
dy, gate, eta = rng.standard_normal(3), 0.3, 0.1
u = (h @ W) @ dy
W_new = W - eta * gate * np.outer(h, dy)
u_new = (h @ W_new) @ dy
print(f"u before the step  {u:+.4f}")
print(f"u after the step   {u_new:+.4f}")
print(f"the formula says   {u - eta * gate * (h @ h) * (dy @ dy):+.4f}")

# %% [markdown]
# ## 2. Collapse as a number
#
# "Nearly all tokens to a few experts" has to become a number before we can count it over seeds.
#
# The **load** is how many choices each expert got: `load_E`, shape $(E,)$. The **share** divides
# by the sum, $\mathit{share}[e] = \mathit{load}[e] / \sum_j \mathit{load}[j]$, so shares add up
# to 1. The **entropy** and the **effective experts** are
#
# $$ H = -\sum_e \mathit{share}[e] \, \log \mathit{share}[e],
#    \qquad \mathit{effective} = \exp(H), $$
#
# with natural logarithms and $0 \log 0 = 0$. Three cases show what it counts.
#
# - *$k$ experts share evenly, the others get nothing:* each of $k$ terms is $-\frac1k \log
#   \frac1k$, so $H = \log k$ and $\mathit{effective} = k$.
# - *One expert has everything:* that is $k = 1$. It cannot be lower: every term
#   $-\mathit{share} \log \mathit{share}$ is zero or more, so $H \ge 0$.
# - *All $E$ share evenly:* that is $k = E$. It cannot be higher. Since $\log z \le z - 1$,
#   $$ H - \log E
#      = \sum_{\mathit{share} > 0} \mathit{share}[e] \log \frac{1}{E \, \mathit{share}[e]}
#      \le \sum_{\mathit{share} > 0} \Big( \frac{1}{E} - \mathit{share}[e] \Big) \le 1 - 1 = 0 . $$
#
# So effective experts go from 1 to $E$. An expert is called **dead** if its share is below 1%.
#
# ### With loops

# %%
load_E = np.array([6, 2, 4, 0])
total, entropy = sum(load_E), 0.0
for e, count in enumerate(load_E):
    share = count / total
    term = -share * np.log(share) if share > 0 else 0.0
    entropy += term
    print(f"expert {e}: load {count}, share {share:.3f}, -share log share = {term:.3f}")
print(f"entropy {entropy:.3f}, effective experts exp(entropy) = {np.exp(entropy):.3f} of 4")

# %% [markdown]
# ### The package's version

# %%
assert np.isclose(metrics.effective_experts(load_E), np.exp(entropy), rtol=1e-12)
print("package:", metrics.effective_experts(load_E).round(3), "effective,", end=" ")
print(metrics.dead_experts(load_E), "dead, shares", metrics.share(load_E).round(3))
for load in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]):
    print(load, "->", metrics.effective_experts(load).round(3))

figure, ax = plt.subplots(figsize=(6.2, 2.7))
ax = pictures.plot_effective_of_shares(ax, 8)

# %% [markdown]
# **Our definition.** A layer has *collapsed* if its effective experts over the last tenth of
# training are fewer than half of its experts. The line at one half is a convention. A yes or no
# hides a lot, so we always show the number itself too.
#
# ## 3. Watch it happen
#
# We want a task so small that nothing can hide. The model is **one MoE layer**: $y = MoE(x)$,
# with 8 experts, top-1, raw gates. The tokens are random vectors around one center, and the
# target of each is a fixed smooth function of it: **one job** for all. The loss is the mean
# squared error; answering zero costs about 1. The learning rate is low, so that we see the loop
# in slow motion. The optimizer is AdamW without weight decay. It divides every gradient by its
# usual size, so a gradient five times as large does not make a step five times as large; and its
# momentum moves an expert that is no longer chosen for a few more steps.

# %%
study = rich_get_richer.Study()
raw = study.settings()["top-1 raw"]
one = rich_get_richer.follow(raw, "one job", seed=0, steps=120, rate=1e-3).trace
print("arrays of shape (steps, experts):", one.load.shape)
for step in (0, 10, 20, 50, 119):
    effective = metrics.effective_experts(one.load[step])
    print(f"step {step:3}: {effective:.2f} effective experts, load {one.load[step]}")

# %%
steps = [0, 3, 6, 10, 16, 30, 60, 119]
Image(pictures.animate_shares(one.share, steps, "Top-1, raw gates, one job"), format="png")

# %% [markdown]
# The dotted line is an even share. (Where pictures cannot move, you see the last step only.)
#
# Now the loop itself: each expert's share, the size of its gradient, and the loss of the tokens it
# served (each point averages four steps). Where a line has a gap, no token chose the expert in
# those steps: it has no loss, and its gradient is exactly zero.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9))
hundred = rich_get_richer.Trace(*(values[:100] for values in one))
axes = pictures.plot_rich_get_richer(axes, hundred, "One job: the rich get richer")
for step in (0, 40, 80, 99):
    print(f"step {step:2}: mean gate {one.decisiveness[step]:.2f}")

# %% [markdown]
# From left to right: the expert with the largest share (black) gets the largest gradient, and one
# that keeps growing, because more tokens and larger gates feed it (below the pictures: with raw
# top-1 gates the mean gate is the mean largest probability). AdamW takes most of that growth out of
# the steps again, but not the difference to an expert without tokens, whose gradient is zero. The
# winner's loss falls, and the router sends it more. Section 1 also predicts *when* the push begins:
# at first the sign of $u$ is a coin toss, and once experts have learned, $u < 0$ for most tokens.
# `pull` is the share of an expert's tokens with $u < 0$. Step 0, before anything is learned, is
# shown for every seed.


# %%
def well_served(trace):
    pull = np.nan_to_num(trace.pull)  # an expert without tokens adds nothing
    return (pull * trace.share).sum(1)  # share of all tokens of a step with u < 0, shape (steps,)


untrained = (rich_get_richer.follow(raw, "one job", seed, steps=1) for seed in study.seeds)
print("step 0, every seed: ", *(f"{well_served(found.trace)[0]:.0%}" for found in untrained))
for step in (1, 6, 11, 21, 41, 81):
    mean = well_served(one)[step : step + 5].mean()
    print(f"steps {step:2} to {step + 4:2}, seed 0: {mean:.0%}")

# %% [markdown]
# Could you have named the winner early? Here is the leader of the first step, and of the first 20
# steps, against the winner at the end.

# %%
right, lines = np.zeros(2, int), []
for seed in study.seeds:
    trace = rich_get_richer.follow(raw, "one job", seed, steps=120, rate=1e-3).trace
    winner = trace.load[-10:].sum(0).argmax()
    first, early = trace.load[0].argmax(), trace.load[:20].sum(0).argmax()
    right += np.array([first == winner, early == winner])
    lines += [f"seed {seed}: leader at step 0: {first}, of 20 steps: {early}, winner: {winner}"]
print(*lines, sep="\n")
print(f"named rightly: {right[0]} by step 0, {right[1]} by 20 steps, of {len(study.seeds)} seeds")

# %% [markdown]
# Nobody knew yet which expert was the best one, and nobody found out: the winner was ahead by luck
# early on, often at the first step already.
#
# ## 4. Where collapse does not happen
#
# The same layer, the same router, the same learning rate, another task: now the tokens come
# from eight clusters, and each cluster has **a job of its own**. Look at your second prediction.

# %%
eight = rich_get_richer.follow(raw, "eight jobs", seed=0, steps=120, rate=1e-3)
figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9))
hundred = rich_get_richer.Trace(*(values[:100] for values in eight.trace))
pictures.plot_rich_get_richer(axes[:2], hundred, "Eight jobs: the same layer")
table = eight.firsts / eight.firsts.sum(1, keepdims=True)
grids.plot_grid(axes[2], table, "after training: shares of\neach cluster's new tokens", "cluster")
effective = metrics.effective_experts(eight.trace.load[-10:].sum(0))
print(f"effective experts over the last ten steps: {effective:.2f} of 8")

# %% [markdown]
# The loop is still there: it works *within* each cluster. Serving a token lowers $u$ for tokens
# that are like it, and those of other clusters are not: they look different and want something
# else. So every cluster ends with a winner (on the right, each row has one large number), and an
# expert starves only if it wins no cluster, for instance because another expert won two.
#
# ### What made the difference?
#
# Several things changed at once. One job means one *function* for all tokens. But those tokens also
# lie around one center, so their vectors have a *direction* in common, while eight centers point
# anywhere. By section 1 either can feed the loop: the function through the experts, the direction
# through the router. (And the clusters differ in their *spread*, the standard deviation around a
# center: 1 in the one job, 0.5 in the eight.) So we change one at a time: one job around the
# origin, the same with the smaller spread, and eight jobs that are all moved by one and the same
# vector. That makes the vectors of the one job shorter and those of the eight jobs longer, too. So
# "shorter" and "longer" change the length alone: every vector is multiplied by the same number.
# There is one number for each seed (four, in the last four lines two): effective experts over the
# last tenth of a run, at the learning rate of the table below.
#
# > **Predict.** Which of the two collapses, "one job, centered" or "eight jobs, shifted"?

# %%
short = ("one job", "one job, centered", "eight jobs", "eight jobs, shifted")
sizes = ("one job, shorter", "eight jobs, longer")
long = ("one job, centered", "one job, centered, spread 0.5")
groups = ((short, 600, 4), (sizes, 600, 2), (long, 2400, 2))
for task, steps, seeds in [(task, *rest) for tasks, *rest in groups for task in tasks]:
    found = []
    for seed in study.seeds[:seeds]:
        load = rich_get_richer.follow(raw, task, seed, steps).trace.load
        found.append(metrics.effective_experts(load[-steps // 10 :].sum(0)))
    print(f"{task:30} {steps:5} steps:", *(f"{effective:5.1f}" for effective in found))

# %% [markdown]
# The direction decides first. Without it the one job does not collapse in 600 steps; with it even
# the eight jobs do. The length alone does neither: the shorter one job collapses all the same, and
# the longer eight jobs do not. So if a router of yours collapses, look at the mean of its inputs: a
# hypothesis from toy runs, but cheap to test.
#
# What the common *function* does is harder to say. After four times as many steps the one job has
# collapsed around the origin as well. But with the spread that each of the eight clusters has it
# has not, though the function is just as common (its inputs are smaller then, and so are the
# router's logits). One job against eight changes the function, the number of clusters and their
# spread. Which of these keeps the eight jobs alive, these runs do not tell: change one thing at a
# time, and you know what you learned.
#
# Now a language model, as in a real MoE: top-1 of 16 experts in two layers, trained on
# text. All its tokens first need the same job (which characters are frequent at all?), and nothing
# keeps their vectors from sharing a direction, so we expect collapse; which of the two matters more
# there, these runs do not tell. This study takes minutes, so we read its record.

# %%
text = files.read_json(rich_get_richer.FIGURES / "collapse.json")
runs = {condition["name"]: condition["runs"] for condition in text["conditions"]}
figure, axes = plt.subplots(2, 1, figsize=(6.8, 3.8))
for ax, name in zip(axes, ("no cure", "Switch loss"), strict=True):
    run = runs[name][0]
    share_SE = np.array(run["series"]["share"])[1::2, 0]  # every other stretch, first layer
    title = f"{name}, seed {run['seed']}: {run['effective_experts'][0]:.1f} effective experts of 16"
    plots.plot_river(ax, run["series"]["step"][1::2], share_SE, title)

# %% [markdown]
# Each band is one expert, its width the share of the load. Above, a few bands take
# everything within the first part of the run. Below, a *balance loss* was added (section 6). Read
# the numbers above the pictures, too: by our definition fewer than 8 effective experts of 16 are a
# collapse, and a picture with many bands can still be one.
#
# One seed proves little. So here is every seed of two studies: the language model, and the small
# layer with nine settings on both tasks. The record of the latter, too, is committed; its runs are
# longer and learn faster than those above. Noise, capacity and Switch loss are cures, and wait for
# section 6, as do the hollow dots: what the router chooses once noise and limits are off. The cures
# have the same names in both studies, but not the same strength: the language model has learned
# noise and a Switch loss of weight 0.01, the small layer normal noise of deviation 1 and a weight
# of 0.1. (A layer with a single expert has nothing to collapse: it is in the table alone.)

# %%
figure, ax = plt.subplots(figsize=(8.4, 3.6))
ax = pictures.plot_effective_seeds(ax, text, "Language model: one dot for each seed and layer")

# %%
settings = files.read_json(rich_get_richer.FIGURES / "collapse_settings.json")
figure, axes = plt.subplots(2, 1, figsize=(9, 5.4))
for ax, task in zip(axes, settings["tasks"], strict=True):
    part = rich_get_richer.of_task(settings, task)
    pictures.plot_effective_seeds(ax, part, f"{task.capitalize()}: one dot for each seed")

# %%
print(rich_get_richer.table(settings))
layers = study.settings()
cures = (
    layers["raw + noise"].noise,
    layers["raw + capacity"].capacity,
    layers["raw + Switch"].balance,
)
print("The cures of this layer:", *cures, sep="\n")

# %% [markdown]
# The columns: runs that collapsed by our definition, means over the seeds of effective experts, of
# dead experts and of the decisiveness explained below, and the loss on new tokens with its standard
# deviation over the seeds.
#
# What the dots and the table say:
#
# - With raw top-1 gates, **one job** collapses to about one expert and **eight jobs** do not
#   collapse. Whether a toy model collapses depends on its inputs and its task as much as on the
#   router.
# - On one job, collapse costs nothing: of all layers that ask one expert for each token, none has a
#   lower mean loss than "top-1 raw", neither the balanced ones nor the one that only *has* one
#   expert. There was nothing to divide. (More experts *for each token* do help: see "top-2" and
#   "all experts".)
# - On eight jobs no run counts as collapsed, and yet some experts are dead, and it
#   costs: compare with "raw + Switch", where all experts work. "Not collapsed" is not "fine".
# - "All experts" cannot starve anybody, since every expert serves every token. It pays with the
#   computation that an MoE is meant to save.

# %% [markdown]
# ## 5. Balanced is not healthy
#
# Look at "renorm. + Switch" in the table: its load is even on both tasks. On eight jobs, compare
# its loss with all the others, and with "one expert" in the last row. A **renormalized** gate
# divides the chosen gates by their sum. With one choice that is $\mathit{prob} / \mathit{prob} =
# 1$, a constant: no gradient can reach the router through it. (The reason is in chapter 06; we
# only check.)

# %%
gate_NK, cache = router.renormalized_gate_forward(logit_NE, expert_NK)
print("gates: ", gate_NK[:, 0])
print("dlogit:", router.renormalized_gate_backward(u_N[:, None], cache).tolist())
eight_jobs = rich_get_richer.of_task(settings, "eight jobs")
print(rich_get_richer.compare(eight_jobs, "renorm. + Switch", "one expert"))

# %% [markdown]
# Such a router never hears of the task. The balance loss still reaches it, and gets its way
# unopposed: an even load, with no reason behind any choice. With its eight experts in perfect
# balance the layer loses to a layer that has a single expert, in as many seeds as the last line
# says.
#
# So we need a second number. **Decisiveness** is the mean over tokens of the largest probability
# in the row: $\frac1N \sum_n \max_e \mathit{prob}[n, e]$. It is $1/E$ if the router prefers
# nobody and 1 if it is sure. Balance is left to right, decisiveness is bottom to top; one dot for
# each seed.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), width_ratios=(1, 1.45))
for ax, task in zip(axes, settings["tasks"], strict=True):
    part = rich_get_richer.of_task(settings, task)
    pictures.plot_plane(ax, part, task.capitalize(), legend=ax is axes[1])

# %% [markdown]
# - **Top left**: sure and collapsed. **Top right**: sure and balanced; on eight jobs this is the
#   place to be. **Bottom right**: balanced and undecided. There the load plot looks perfect and the
#   router tells nothing apart.
# - On *one job* no balanced router is sure, and none should be: there is nothing to be sure about.
#   No place in the plane is right for every task. What decides is the loss on new tokens.
#
# ## 6. Cures, and what they touch
#
# Keep two things apart:
#
# - the **load in training**: what the experts were given, after noise and limits;
# - the **choice of the clean router**: what it would choose by itself, without noise and limits,
#   on text it has not seen.
#
# Three cures, and the place where each acts:
#
# - **Noise** is added to the logits before the choice, so that others get a chance. It is
#   switched off after training. Nothing forbids a collapse.
# - **Capacity with overflow to the next best expert**: an expert has only so many places (an even
#   share times the *capacity factor*, as printed with the table); a choice that finds it full goes
#   to the token's next best one. The load *must* spread, whatever the router wants.
# - The **Switch loss** is added to the loss, times a small weight:
#   $$ \mathit{switch} = E \sum_e f[e] \, P[e], \qquad P[e] = \frac1N \sum_n \mathit{prob}[n, e], $$
#   where $f[e]$ is expert $e$'s share of the choices. Counts have no gradient, so $f$ is a
#   constant; $\mathit{prob}$ has one, so this cure speaks to the router itself. In numbers:

# %%
chosen_NK = np.zeros((3, 1), int)  # all three tokens chose expert 0
value, cache = balance.switch_loss_forward(prob_NE, chosen_NK)
dprob_NE = balance.switch_loss_backward(np.float64(1.0), cache)
push_NE = -softmax.softmax_backward(dprob_NE, prob_cache)
even, _ = balance.switch_loss_forward(np.full((3, 3), 1 / 3), np.arange(3)[:, None])
print(f"Switch loss: {value:.3f} here, {even:.3f} at perfect balance")
figure, ax = plt.subplots(figsize=(3.6, 2.9))
ax = grids.plot_grid(ax, push_NE, "how the Switch loss\nmoves the logits")

# %% [markdown]
# It pushes the crowded expert 0 down and the others up, for every token: the opposite of the loop.
#
# Does it reach the router's own choice? The language model, first seed, first layer:

# %%
figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharey=True)
names = ("no cure", "noise", "capacity", "Switch loss")
for ax, name in zip(axes.flat, names, strict=True):
    pictures.plot_load_beside_choice(ax, runs[name][0], name)
legend = axes[0, 0].legend(fontsize=8, frameon=False)

# %% [markdown]
# With **capacity** the filled bars are far more level than the hollow ones: the load is spread, the
# router's wish is not. (Dotted: an even share.) Take the limit away, as this study does when it
# measures the clean router (many systems keep a looser limit), and the load follows the hollow
# bars. On the small layer's one job it was otherwise: there the hollow dots of "raw + capacity" are
# high, too. An expert that is forced to serve learns, and may then be wanted. With the **Switch
# loss** filled and hollow agree: the router itself changed. Averages over all seeds and both
# layers ("clean router" are the effective experts of the router's own choice, "drops" the share of
# choices without a place, none here, as a full expert passes them on; the loss is in nats, -log p
# with the natural logarithm):

# %%
print(collapse.table(text))
figure, ax = plt.subplots(figsize=(8, 3))
title = f"Language model after {text['settings']['steps']} steps"
ax = pictures.plot_losses(ax, text, title, "validation loss\n(nats per character)")

# %% [markdown]
# **What did the cures cost?** Runs of one seed start from the same weights and see the same data,
# so we compare seed by seed.

# %%
print("text")
for name in ("noise", "capacity", "noise + capacity", "Switch loss"):
    print(" ", rich_get_richer.compare(text, name, "no cure"))
for task in settings["tasks"]:
    print(task)
    for name in ("raw + noise", "raw + capacity", "raw + Switch"):
        part = rich_get_richer.of_task(settings, task)
        print(" ", rich_get_richer.compare(part, name, "top-1 raw"))

# %% [markdown]
# A plus sign means that the cure made the model *worse*. On text, at this short budget, and on one
# job, balance costs loss. Two likely reasons: an undecided router has small raw gates (in the table
# of one job, compare "raw + Switch" with "renorm. + Switch"), and an expert that sees an eighth of
# the tokens learns a common job more slowly. On eight jobs the Switch loss pays. Longer training or
# larger models may answer differently; these records do not tell. Balance is a means. Ask what it
# buys, on your task, with your budget.
#
# **Your predictions.** One job whose tokens share a direction: about one expert survives; without
# the direction most were still alive after 600 steps. Eight jobs: most survive. And an even load
# alone says nothing about the router.
#
# ## What you can do now
#
# - Derive why the chosen expert is pushed up when $u < 0$, and why learning makes $u$ negative.
# - Report collapse as effective experts, over all seeds, with the definition beside it.
# - Put decisiveness next to balance before you call a router healthy.
# - Ask of every cure: does it change the load, or the router? And what does it cost?

# %% [markdown]
# ## Exercise 1: effective experts with loops
#
# (10 minutes) Write it with `for`, without NumPy's sums. `load_E` holds counts; some may be zero.


# %%
def my_effective_experts(load_E):
    raise NotImplementedError  # your lines here


print(exercises_07.check_effective_experts(my_effective_experts))

# %% [markdown]
# <details><summary>Hint</summary>Three lines of a loop: the share of the expert; if it is not zero,
# its part of the entropy; the sum. The exponential comes after the loop.</details>
#
# ## Exercise 2: the gradient of the Switch loss
#
# (15 minutes) Take section 6's formula and derive `dprob_NE`, the gradient of $\mathit{switch}$
# with respect to `prob_NE`, shape $(N, E)$. `expert_NK` holds the chosen experts, shape $(N, K)$,
# so that there are $N K$ choices in all. Use nothing of `moe_numpy`.


# %%
def my_switch_gradient(prob_NE, expert_NK):
    raise NotImplementedError  # your lines here


print(exercises_07.check_switch_gradient(my_switch_gradient))

# %% [markdown]
# <details><summary>Hint</summary><code>f</code> is a constant: only <code>P</code> moves with
# <code>prob</code>. <code>P[e]</code> is a mean over <code>N</code> tokens. What is its derivative
# in one <code>prob[n, e]</code>? Count <code>f</code> from <code>expert_NK</code>.</details>
#
# ## Exercise 3: an alarm for collapse
#
# (20 minutes) You watch the first 20 steps of a run: `share_SE`, shape (20, $E$). Return `True` if
# the run will end in collapse. The check takes raw top-1 on both tasks, all seeds, and reads from
# the record how each of them ended. Up to one wrong answer in eight is allowed. It also tries other
# numbers of experts.


# %%
def my_alarm(share_SE):
    raise NotImplementedError  # your lines here


early, collapsed = rich_get_richer.first_steps(settings, "top-1 raw", steps=20)
print(f"{len(early)} runs, {sum(collapsed)} of them ended collapsed")
print(exercises_07.check_alarm(my_alarm, early, collapsed))

# %% [markdown]
# <details><summary>Hint</summary>Average the shares of the last few steps, take their effective
# experts as in exercise 1, and compare with a part of the number of experts,
# <code>share_SE.shape[1]</code>.</details>
#
# ## Where to go next
#
# - In the package: `moe_numpy/moe/balance.py` has the Switch loss and its relatives, each with its
#   gradient; `moe_numpy/moe/capacity.py` decides who gets a place.
# - Many models of today balance almost without a loss: every expert has a bias that enters the
#   choice but not the gate, and is moved by its load (DeepSeek-V3, which keeps a tiny loss beside
#   it). Here it is `bias_rate`, and `python -m moe_numpy systems deepseek_v3` explains it.
# - Try it: `follow(raw, ...)` above with `study.settings()["top-2"]` in the place of `raw`, on "one
#   job", for 600 steps. Does a second choice help? Find it in the table first, then compare `.loss`
#   and the effective experts of `.trace.load`.
# - Shazeer et al. 2017, *Outrageously Large Neural Networks*, describes the loop in words (section
#   4); Fedus et al. 2022, *Switch Transformers*, is the source of the Switch loss.
