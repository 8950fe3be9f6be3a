# %% [markdown]
# # 06 · Top-k: the kink in the gate
#
# A Mixture-of-Experts layer holds many small networks, the *experts*, and asks only a few of them
# for each token. Who is asked is a **choice**, and a choice has no slope: one expert more or
# less, nothing in between. Yet the router that makes the choice is trained by slopes like
# everything else. This chapter shows through which door the gradient reaches the router, and
# finds a setting that many programs offer, in which that door is shut.
#
# **After this chapter you can**
#
# - compute gates in two orders, and prove that the two orders agree;
# - derive the gradient of a gate, and say which logits get none;
# - recognize a router that cannot learn from the task;
# - say what a finite difference sees where the choice changes;
# - read a dispatch plan, and write dispatch, combine and their gradients.
#
# | | |
# |---|---|
# | **Builds on** | the chain rule, sums over an index, indexing of NumPy arrays |
# | **Time** | about 60 minutes, and 75 more for the exercises |
# | **Key moment** | section 7: gradients that are black where you expected numbers |
#
# Where it says **Predict**, write your answer down before you run the next cell. A wrong
# prediction that you wrote down teaches more than a right one that you nodded at.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np

from moe_numpy import Capacity, MoEConfig, moe_backward, moe_forward
from moe_numpy.classroom import exercises_06, gradcheck
from moe_numpy.classroom.contract import Case
from moe_numpy.lab import audit, pictures
from moe_numpy.moe import capacity, dispatch, experts, layer, router
from moe_numpy.ops import softmax

np.set_printoptions(precision=2, floatmode="fixed", sign=" ")
pictures.use_small_png()

# %% [markdown]
# ## 1. Six steps, one of which has no slope
#
# **Why choose at all?** With four experts, letting all of them answer costs four times the work
# of one. Letting the best two answer costs two times the work, whether there are four experts or
# four hundred. (Only the scores grow with their number, and a score is cheap.) The price is the
# choice.
#
# The layer takes $N$ tokens, each a vector of $C$ numbers, and returns as many:
#
# | step | formula | shape | slope? |
# |---|---|---|---|
# | score | `logit = x @ w` | `(N, E)` | yes |
# | **choose** | `expert[n]` = the `K` experts of largest logit | `(N, K)` integers | **no** |
# | weigh | `gate[n]` = how much each chosen expert counts | `(N, K)` | yes |
# | dispatch | copy each token to the rows of its experts | `(R, C)` | yes |
# | ask | each expert computes on its own rows | `(R, C)` | yes |
# | combine | `y[n] = sum over k of gate[n, k] * (answer of expert[n, k])` | `(N, C)` | yes |
#
# The letters: `N` tokens, `C` channels, `E` experts, `K` choices per token, `R` rows that the
# experts work on. A name ends with the letters of its shape: `logit_NE` is a table with a row
# for each token and a column for each expert. Lower-case `n`, `c`, `e`, `k`, `r` count along
# these axes, from 0.
#
# Our example is small enough to print in full: eight tokens, three channels, four experts, two
# choices. The words are there to have names; the numbers are random.
#
# Everything is told three times: as a formula, as loops over indices, and as the package computes
# it, with the difference printed. The package's functions come in pairs. `something_forward`
# returns its result and a *cache*, the numbers that the way back will need; `something_backward`
# takes the gradient of the result and that cache, and returns the gradient of what went in. A
# configuration, `cfg`, says what kind of layer it is.

# %%
words = "a small cat sleeps on the warm mat".split()
N, C, E, K = 8, 3, 4, 2
rng = np.random.default_rng(0)
w_CE = rng.normal(size=(C, E)).round(1)
x_NC = rng.normal(size=(N, C)).round(1)
logit_NE = np.zeros((N, E))
for n in range(N):
    for e in range(E):
        for c in range(C):
            logit_NE[n, e] += x_NC[n, c] * w_CE[c, e]
params = router.RouterParams(w_CE=w_CE, noise_CE=None, bias_E=None)
cfg = MoEConfig(num_experts=E, top_k=K, hidden=5)
package_NE = router.router_forward(x_NC, params, cfg)[0]
print(f"largest difference from the package: {np.abs(package_NE - logit_NE).max():.1e}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(8.6, 3.2))
pictures.plot_grid(axes[0], x_NC, "x_NC, tokens", columns="channel c", digits=1, names=words)
pictures.plot_grid(axes[1], w_CE, "w_CE, the router", rows="channel c", digits=1)
pictures.plot_grid(axes[2], logit_NE, "logit_NE = x_NC @ w_CE")
figure.tight_layout()

# %% [markdown]
# ## 2. Choose: the k largest logits
#
# Each token takes the expert with its largest logit, then the largest among the rest, until it
# has `K`. A tie goes to the lower index.
#
# > **Predict.** Read the right-hand grid above: which two experts does *cat* choose, and which is
# > first? Which expert will be chosen least often over all eight tokens?


# %%
def loop_top_k(score_E, k):
    chosen = []
    for _ in range(k):
        best = None
        for e in range(len(score_E)):
            if e not in chosen and (best is None or score_E[e] > score_E[best]):
                best = e
        chosen.append(best)
    return chosen


expert_NK = np.array([loop_top_k(logit_NE[n], K) for n in range(N)])
for n in range(N):
    print(f"{n} {words[n]:<7} logits {logit_NE[n]}  chooses {expert_NK[n]}")

# %%
package_NK = router.top_k(logit_NE, K)
print("the package chooses the same:", np.array_equal(package_NK, expert_NK))
for e in range(E):
    print(f"expert {e} is chosen by {(expert_NK == e).sum()} tokens")

# %% [markdown]
# `expert_NK` holds whole numbers. Move a logit a little, and `expert_NK` does not move at all, or
# it jumps. Its derivative is zero almost everywhere and does not exist at the ties. **No gradient
# can flow through the choice**, so it has to flow through something else: the weights of the
# chosen.
#
# ## 3. Weigh: the gates
#
# The two answers are to be mixed with weights that are positive and sum to one. The **softmax**
# makes such weights out of any numbers $z_e$:
#
# $$\mathrm{softmax}(z)_e = \frac{\exp(z_e)}{\sum_j \exp(z_j)}$$
#
# Since $\exp(-\infty) = 0$, there is a neat way to leave the others out: set every logit that was
# not chosen to minus infinity, *then* apply the softmax. Frames mark the chosen experts.

# %%
masked_NE = np.full((N, E), -np.inf)
full_gate_NE = np.zeros((N, E))
for n in range(N):
    for e in expert_NK[n]:
        masked_NE[n, e] = logit_NE[n, e]
    total = sum(np.exp(masked_NE[n, e]) for e in range(E))
    for e in range(E):
        full_gate_NE[n, e] = np.exp(masked_NE[n, e]) / total
chosen_NE = np.isfinite(masked_NE)
figure, axes = plt.subplots(1, 3, figsize=(8.6, 3.2), width_ratios=(1.25, 1, 1))
pictures.plot_grid(axes[0], logit_NE, "1. logit_NE", marked=chosen_NE, names=words)
pictures.plot_grid(axes[1], masked_NE, "2. the others: minus infinity", marked=chosen_NE)
pictures.plot_grid(axes[2], full_gate_NE, "3. softmax: the gates", marked=chosen_NE)
figure.tight_layout()

# %% [markdown]
# The package does not carry the zeros along. It keeps the `K` chosen logits of each token, `(N,
# K)`, and takes the softmax of those: the same numbers, without ever computing with infinity.
# `np.take_along_axis` reads from each row of a table the columns that we name.

# %%
gate_NK, gate_cache = router.renormalized_gate_forward(logit_NE, expert_NK)
print(gate_NK)
loop_NK = np.take_along_axis(full_gate_NE, expert_NK, axis=1)
print(f"largest difference from the loops: {np.abs(gate_NK - loop_NK).max():.1e}")

# %% [markdown]
# ### The other order
#
# Many papers and programs write the steps in another order: softmax over *all* experts first,
# which gives probabilities `prob_NE`; keep the chosen ones; divide by their sum. You may read
# that one order is right and the other wrong. **They are the same function.** For one token, with
# logits $z_e$ and a chosen expert $i$:
#
# ```text
# p_i      =  exp(z_i) / Z              softmax over all: Z = sum of exp(z_j) over all experts j
# s        =  sum of p_j                over the chosen j
#          =  S / Z                     with S = sum of exp(z_j) over the chosen j
#
# p_i / s  =  (exp(z_i) / Z) / (S / Z)  insert both
#          =  exp(z_i) / S              Z cancels
#          =  softmax among the chosen logits
# ```
#
# The unchosen logits enter through `Z` alone, and `Z` cancels. Keep that in mind for
# section 4.
#
# If we leave the division out, we get another function: **raw** gates, the probabilities of the
# chosen experts as they are. Both kinds are in use. The divided ones we call **renormalized**.
#
# > **Predict.** Do the raw gates of a token sum to more or to less than one? For which tokens is
# > the difference from the renormalized gates large?


# %%
def softmax_first(logit_NE):
    prob_NE = softmax.softmax_forward(logit_NE)[0]
    raw_NK = np.take_along_axis(prob_NE, expert_NK, axis=1)
    return raw_NK / raw_NK.sum(1, keepdims=True)


prob_NE, prob_cache = softmax.softmax_forward(logit_NE)
raw_NK, raw_cache = router.raw_gate_forward(prob_NE, expert_NK)
gap = np.abs(softmax_first(logit_NE) - gate_NK).max()
print(f"largest difference between the two orders: {gap:.1e}")
for n in range(N):
    print(f"{words[n]:<7} raw {raw_NK[n]} sum {raw_NK[n].sum():.2f}   renormalized {gate_NK[n]}")

# %% [markdown]
# Raw gates sum to less than one: what is missing is the probability of the experts that were not
# asked. An undecided token, whose logits are all alike, speaks with a low voice; a decided one
# speaks with nearly full voice. Renormalized gates forget that difference.
#
# ## 4. The gradient of the gate
#
# ### 4.1 What the gate hears
#
# Let $L$ be the loss, one number at the very end. We write `dy` for the gradient $\partial L /
# \partial y$, and so for every name: **`dX` has the shape of `X` and says how fast `L` grows when
# an entry of `X` grows.** "Slope of y in x" below is short for $\partial y / \partial x$. Take one
# token. Let `o_k` be the answer of its k-th expert, a vector of `C` numbers, and `y` the mix:
#
# ```text
# y[c]                      = sum over k of gate[k] * o_k[c]
# slope of y[c] in gate[k]  = o_k[c]                          only one term has gate[k]
# dgate[k]                  = sum over c of dy[c] * o_k[c]    chain rule: all c add up
# ```
#
# So each gate hears *one* number, how well its expert's answer points along `dy`. If `dgate[k]`
# is negative, more of this expert lowers the loss. For now we take `dgate_NK` as given and carry
# it back to the logits.
#
# ### 4.2 The softmax
#
# How does $p_i$ change with a logit $z_e$? Write `u_i = exp(z_i)`, so that `p_i = u_i / Z` with
# `Z = sum of all u_j`, and `[i = e]` for 1 if `i` is `e` and 0 if not.
#
# ```text
# slope of u_i in z_e  =  u_i [i = e]                        exp is its own derivative
# slope of Z   in z_e  =  u_e                                one term of the sum moves
# slope of p_i in z_e  =  (u_i [i = e] Z - u_i u_e) / Z^2    quotient rule
#                      =  p_i [i = e] - p_i p_e              u_i / Z = p_i and u_e / Z = p_e
#                      =  p_i ([i = e] - p_e)                p_i taken out
#
# dz_e  =  sum over i of dp_i p_i ([i = e] - p_e)            chain rule: all p_i move
#       =  dp_e p_e  -  p_e (sum over i of p_i dp_i)         [i = e] leaves one term of the sum
#       =  p_e (dp_e - m)                                    with m = sum over i of p_i dp_i
# ```
#
# `m` is a mean: each `dp_i`, weighted with its probability. Training moves every number *against*
# its gradient. So a logit rises if its `dp_e` lies below the mean, that is, if its expert does
# better than the others do on average.
#
# ### 4.3 Raw gates
#
# A raw gate *is* a probability: `gate[k] = p[expert[k]]`. Thus `dp_e = dgate[k]` for the chosen
# expert `e = expert[k]` and `dp_e = 0` for all others. Insert that in the last line of 4.2:
#
# ```text
# m     = sum over k of gate[k] dgate[k]                 the other terms of the sum are zero
# dz_e  = p_e (dgate[k] - m)                             e was chosen, as choice k
# dz_e  = p_e (0 - m) = -p_e m                           e was not chosen
# ```
#
# **Every logit gets a gradient**, chosen or not: an unchosen expert takes part in `Z`.
#
# ### 4.4 Renormalized gates
#
# They are a softmax among the `K` chosen logits. Use 4.2 with the `K` chosen in place of all:
#
# ```text
# m     = sum over k of gate[k] dgate[k]
# dz_e  = gate[k] (dgate[k] - m)                         e was chosen, as choice k
# dz_e  = 0                                              e was not chosen
# ```
#
# The last line is not an approximation. `Z` has canceled; the unchosen logits do not occur in
# the formula at all.
#
# ### 4.5 One choice
#
# With `K = 1` the renormalized gate is `exp(z) / exp(z) = 1`, whatever the logit. And the formula
# agrees: `m = 1 * dgate`, so `dz = 1 * (dgate - dgate) = 0`. **A renormalized top-1 router gets no
# gradient from the loss on its output, at no logit, for no token, ever.** Raw top-1 gates are
# alive: 4.3 with `m = p_e dgate` gives `dz_e = p_e (1 - p_e) dgate` for the chosen expert.
#
# ### 4.6 The slopes as a picture
#
# Row `i`, column `e` of this table holds the slope of the gate of expert `i` in the logit of expert
# `e` (the table's name is *Jacobian*), for the token *cat*. By 4.2 it is `p_i ([i = e] - p_e)`,
# with all probabilities for raw gates, and with the gates themselves for renormalized ones. The
# gate of an expert that was not chosen is zero and stays zero: its row is empty.
#
# > **Predict.** Which columns are all zero with raw top-2 gates, with renormalized top-2 gates,
# > with renormalized top-1 gates? What does every row sum to, and why?


# %%
cat, one_E = 2, np.eye(E)[expert_NK[2, 0]]  # one_E: the renormalized top-1 gates of cat
figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.9))
for ax, title, p_E, kept_E in (
    (axes[0], "raw top-2", prob_NE[cat], chosen_NE[cat]),
    (axes[1], "renormalized top-2", full_gate_NE[cat], np.ones(E)),
    (axes[2], "renormalized top-1", one_E, np.ones(E)),
):
    slope_EE = kept_E[:, None] * (np.diag(p_E) - np.outer(p_E, p_E))  # p_i ([i = e] - p_e)
    pictures.plot_grid(ax, slope_EE, title, "gate of expert i", "logit of expert e", limit=0.25)
    print(f"{title:<19} rows sum to {slope_EE.sum(1).round(12) + 0.0}")
figure.tight_layout()

# %% [markdown]
# (In such pictures a plain `0` is an exact zero, and a `0.00` is only small.) Every row sums to
# zero: adding the same number to all logits changes no gate. With raw gates every column is alive,
# with renormalized ones only those of the chosen experts, and on the right nothing is left.
#
# Now the same with loops, the formulas of 4.3 and 4.4 word for word, for all eight tokens. The
# upstream gradient `dgate_NK` is random: all ones would hide most mistakes, because gates that sum
# to one do not react to them.

# %%
dgate_NK = rng.normal(size=(N, K)).round(1)
loop_raw_NE, loop_renormalized_NE = np.zeros((N, E)), np.zeros((N, E))
for n in range(N):
    m_raw = sum(raw_NK[n, k] * dgate_NK[n, k] for k in range(K))
    m_ren = sum(gate_NK[n, k] * dgate_NK[n, k] for k in range(K))
    for e in range(E):
        loop_raw_NE[n, e] = -prob_NE[n, e] * m_raw
    for k, e in enumerate(expert_NK[n]):
        loop_raw_NE[n, e] = prob_NE[n, e] * (dgate_NK[n, k] - m_raw)
        loop_renormalized_NE[n, e] = gate_NK[n, k] * (dgate_NK[n, k] - m_ren)
figure, axes = plt.subplots(1, 3, figsize=(8.6, 3.2), width_ratios=(0.8, 1, 1))
pictures.plot_grid(axes[0], dgate_NK, "dgate_NK", columns="choice k", digits=1, names=words)
pictures.plot_grid(axes[1], loop_raw_NE, "raw: dlogit_NE", marked=chosen_NE)
pictures.plot_grid(axes[2], loop_renormalized_NE, "renormalized: dlogit_NE", marked=chosen_NE)
figure.tight_layout()

# %%
dprob_NE = router.raw_gate_backward(dgate_NK, raw_cache)
package_raw_NE = softmax.softmax_backward(dprob_NE, prob_cache)
package_renormalized_NE = router.renormalized_gate_backward(dgate_NK, gate_cache)
for name, package_NE, loop_NE in (
    ("raw", package_raw_NE, loop_raw_NE),
    ("renormalized", package_renormalized_NE, loop_renormalized_NE),
):
    print(f"{name}: package and loops differ by {np.abs(package_NE - loop_NE).max():.1e}")
    unchosen = np.abs(package_NE[~chosen_NE])
    print(f"    unchosen logits get from {unchosen.min():.1e} to {unchosen.max():.1e}")

# %% [markdown]
# Formulas, loops and package could share one misunderstanding. So we ask the definition of a
# slope: move one logit by a small `h` in both directions and look. We do it for both orders of
# section 3; the same function must have the same slopes.


# %%
def softmax_last(logit_NE):
    return router.renormalized_gate_forward(logit_NE, expert_NK)[0]


h = 1e-5
for gates in (softmax_last, softmax_first):
    slope_NE = np.zeros((N, E))
    for n, e in np.ndindex(N, E):
        step_NE = np.zeros((N, E))
        step_NE[n, e] = h
        change_NK = gates(logit_NE + step_NE) - gates(logit_NE - step_NE)
        slope_NE[n, e] = (change_NK * dgate_NK).sum() / (2 * h)
    error = np.abs(slope_NE - package_renormalized_NE).max()
    print(f"{gates.__name__:<14} differs from the package's backward by {error:.1e}")

# %% [markdown]
# ### 4.7 The trap
#
# A program that offers "top-k with renormalized gates" offers `k = 1` too, and nothing crashes. In
# public code one often meets a sum *plus a small number*, so that the gate is not exactly one:
# `gate = p / (p + 1e-6)`. Its slope in `p` is `1e-6 / (p + 1e-6)^2`.
#
# > **Predict.** Does the small number bring the router back to life? The cell prints the largest
# > gradient of any logit, over all tokens.

# %%
expert_N1, dgate_N1 = expert_NK[:, :1], dgate_NK[:, :1]
p_N1, one_cache = router.raw_gate_forward(prob_NE, expert_N1)


def to_logits(dp_N1):
    dprob_NE = router.raw_gate_backward(dp_N1, one_cache)
    return softmax.softmax_backward(dprob_NE, prob_cache)


cache = router.renormalized_gate_forward(logit_NE, expert_N1)[1]
dead_NE = router.renormalized_gate_backward(dgate_N1, cache)
print(f"renormalized  {np.abs(dead_NE).max():.1e}")
repaired_N1 = dgate_N1 * 1e-6 / (p_N1 + 1e-6) ** 2
print(f"small number  {np.abs(to_logits(repaired_N1)).max():.1e}")
print(f"raw           {np.abs(to_logits(dgate_N1)).max():.1e}")

# %% [markdown]
# The small number, meant to guard against a division by zero, turns a zero into a whisper. Plain
# gradient descent hardly hears it. Adam, which divides each gradient by its usual size, may, as
# long as no other loss reaches the router and no rounding swallows it: nothing to build on. The
# cure is the raw gate, and in this package `MoEConfig(top_k=1)` takes it unless you ask for the
# other.
#
# What makes the trap nasty: the experts go on learning, the loss goes down, and a balance loss
# (section 7) can make the load look perfect. Only the gradient tells.
#
# ## 5. The kink
#
# So far the set of chosen experts stood still. Now we let **one** logit rise until its expert
# takes another one's place. Think of one token; experts 0 to 3 answer with plain numbers `o_E`
# (the vectors of a real layer behave so in each channel). The logit of expert 2 moves from below
# to above that of expert 1, which holds the second place.
#
# > **Predict.** Draw `y = sum over k of gate[k] * o[expert[k]]` against the moving logit: is the
# > line smooth, does it have a corner, or does it jump? Does it matter what the two rivals answer?


# %%
def renormalized_output(z_NE, o_E, k=2):
    """Output of each token, and its slope in the logit of expert 2; dy = 1, so dgate = o."""
    expert_NK = router.top_k(z_NE, k)
    gate_NK, cache = router.renormalized_gate_forward(z_NE, expert_NK)
    dlogit_NE = router.renormalized_gate_backward(o_E[expert_NK], cache)
    return (gate_NK * o_E[expert_NK]).sum(1), dlogit_NE[:, 2]


def raw_output(z_NE, o_E):
    expert_NK, (prob_NE, prob_cache) = router.top_k(z_NE, 2), softmax.softmax_forward(z_NE)
    gate_NK, cache = router.raw_gate_forward(prob_NE, expert_NK)
    dprob_NE = router.raw_gate_backward(o_E[expert_NK], cache)
    return (gate_NK * o_E[expert_NK]).sum(1), softmax.softmax_backward(dprob_NE, prob_cache)[:, 2]


# %%
moving = np.linspace(-1, 3, 400)  # the tie, at 1, is not among them
z_NE = np.tile([1.5, 1.0, 0.0, -0.5], (len(moving), 1))
z_NE[:, 2] = moving
rivals_differ = np.array([0.5, 2.0, -1.0, 0.5])
rivals_agree = np.array([0.5, 2.0, 2.0, 0.5])
figure, axes = plt.subplots(2, 2, figsize=(8.6, 5.6), sharex=True)
for column, o_E in enumerate((rivals_differ, rivals_agree)):
    outputs = {"renormalized": renormalized_output(z_NE, o_E), "raw": raw_output(z_NE, o_E)}
    outputs["all four experts"] = renormalized_output(z_NE, o_E, k=4)
    for row, label in enumerate(("output y", "slope dy / dlogit")):
        curves = {name: pair[row] for name, pair in outputs.items()}
        pictures.plot_kink(axes[row, column], moving, curves, tie=1.0, ylabel=label)
    axes[0, column].set_title(f"experts 1 and 2 answer {o_E[1]} and {o_E[2]}", fontsize=10)
axes[0, 0].legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# Left of the dotted line expert 1 is in, right of it expert 2; at the tie itself a filled dot is
# the value, a hollow one the limit from the other side. With all four experts nothing is chosen
# and nothing breaks. With two:
#
# - **The output jumps** (left). Both rivals have the same logit at the tie, so both have the same
#   gate there, call it `g`; nothing else changes. The newcomer takes over the gate of the one who
#   leaves, and brings its own answer: `y after - y before = g * (o_2 - o_1)`.
# - **The jump closes only where the rivals agree** (right). Then a *kink* is left: the line is
#   connected, but its slope is not. Experts that learn rarely agree, so a jump is the rule.
# - **Before the tie the renormalized slope is exactly zero** (below): expert 2 was not chosen,
#   its logit is not heard. Nothing tells the router that a jump is near, whether it would help or
#   hurt. The raw slope is not zero there, but it knows nothing of the jump either: it comes from
#   `Z`.
#
# We check the formula of the jump from both sides of the tie.

# %%
beside_NE = np.tile([1.5, 1.0, 1.0, -0.5], (2, 1))
beside_NE[:, 2] += [-1e-9, 1e-9]
renormalized_g = router.renormalized_gate_forward(beside_NE, router.top_k(beside_NE, 2))[0][0, 1]
raw_g = softmax.softmax_forward(beside_NE)[0][0, 1]
for name, output, g in (
    ("renormalized", renormalized_output, renormalized_g),
    ("raw", raw_output, raw_g),
):
    before, after = output(beside_NE, rivals_differ)[0]
    predicted = g * (rivals_differ[2] - rivals_differ[1])
    print(f"{name:<12}  jump {after - before:+.6f}   g * (o_2 - o_1) {predicted:+.6f}")

# %% [markdown]
# ### What a finite difference sees
#
# A finite difference with step `h` looks at two points, `h` to the left and `h` to the right. If
# the tie lies between them, it sees the jump and takes it for a slope:
#
# ```text
# (y(z + h) - y(z - h)) / 2h   =   about the slope   +   jump / 2h
# ```
#
# > **Predict.** We stand 0.001 before the tie. What does the estimate do as `h` goes from 0.1
# > down to 0.00001? (First column: renormalized gates; second: raw.)

# %%
here = np.array([[1.5, 1.0, 0.999, -0.5]])
slopes = [output(here, rivals_differ)[1][0] for output in (renormalized_output, raw_output)]
print(f"             backwards {slopes[0]:11.5f} {slopes[1]:11.5f}")
for h in (1e-1, 1e-2, 1.01e-3, 0.99e-3, 1e-4, 1e-5):
    step = np.array([[0.0, 0.0, h, 0.0]])
    estimates = []
    for output in (renormalized_output, raw_output):
        up, down = output(here + step, rivals_differ)[0], output(here - step, rivals_differ)[0]
        estimates.append((up - down)[0] / (2 * h))
    same = np.array_equal(router.top_k(here + step, 2), router.top_k(here - step, 2))
    note = "" if same else "  the set of chosen experts changed"
    print(f"h = {h:.5f}, estimates {estimates[0]:11.5f} {estimates[1]:11.5f}{note}")

# %% [markdown]
# The estimate grows like `1 / h` until the two points lie on one side; then it is right at once.
# The backward was right all along: it is the slope *at this point*, with the choice held fixed. A
# checker that knows nothing of choices would have called it wrong.
#
# So the gradient checker of this package watches every whole number and every yes or no that a
# forward returns, the chosen experts among them. A probe (one little move, compared with the
# backward) that changes one of them is thrown away and drawn anew with a smaller step, and
# **counted**. A `Case` holds the arguments at which to check. Here the whole layer is checked
# three times: as in our example, and with column 1 of the router ever closer to column 0, so that
# experts 0 and 1 nearly tie for every token.

# %%
experts_drawn, lines = experts.init_experts(np.random.default_rng(6), cfg, C, "float64"), []
for gap in (None, 1e-4, 1e-9):
    close_CE = w_CE.copy()
    if gap is not None:
        close_CE[:, 1] = close_CE[:, 0] + gap
    moe = layer.MoEParams(params._replace(w_CE=close_CE), experts_drawn)
    case, draw = Case("", (x_NC, moe, cfg)), np.random.default_rng(1)
    found = gradcheck.check_functions("moe", moe_forward, moe_backward, case, draw)
    lines.append("our example" if gap is None else f"columns {gap} apart")
    lines.append(f"  worst error {max(found.errors.values()):.1e}, passed: {not found.failures}")
    lines.append(f"  decisions changed for {found.redrawn} of {found.probes} probes,")
    lines.append(f"  for {found.skipped} of these at every step size")
print(*lines, sep="\n")

# %% [markdown]
# Without the count all three would look alike: small errors, passed. Why so few, if the two experts
# nearly tie for *every* token? A probe moves one number. A number of a token moves both logits
# alike; only a weight in column 0 or 1 moves one without the other. In the second case the smaller
# steps saved the probes. In the third no step was small enough: those numbers were **not checked at
# all**, and "passed" speaks for the others only. A count that is not zero says: *you are measuring
# beside a cliff*. Move the case away from ties; do not loosen the tolerance.
#
# ## 6. Dispatch and combine: there and back
#
# **Why move anything?** An expert is a few matrix products, and those are fast when all its tokens
# lie side by side. So the chosen tokens are copied into a table of **rows**, `x_RC`, sorted by
# expert: the rows of the first expert, then those of the second, and so on. Without a limit there
# are `R = N * K` rows. A `Plan` writes down who sits where, in maps of whole numbers:
#
# | map | shape | says |
# |---|---|---|
# | `token_R[r]` | `(R,)` | the token of row `r` |
# | `choice_R[r]` | `(R,)` | which choice the row serves, counted as `n * K + k` |
# | `slot_NK[n, k]` | `(N, K)` | the row of choice `k` of token `n` (`R`: it has none) |
# | `offsets` | `E + 1` numbers | expert `e` owns rows `offsets[e]` to `offsets[e + 1] - 1` |

# %%
token_R, choice_R, offsets = [], [], [0]
slot_NK = np.zeros((N, K), int)
for e in range(E):
    for n, k in np.ndindex(N, K):
        if expert_NK[n, k] == e:
            slot_NK[n, k] = len(token_R)
            token_R.append(n)
            choice_R.append(n * K + k)
    offsets.append(len(token_R))
# what make_plan takes: the choices, what they were ranked by, the probabilities, the limit (none)
plan = capacity.make_plan(expert_NK, logit_NE, prob_NE, None)[1]
for name, mine in zip(plan._fields, (slot_NK, token_R, choice_R, offsets), strict=True):
    print(f"{name:<8} {np.array(mine).tolist()}")
    print("         the package has the same:", np.array_equal(getattr(plan, name), mine))

# %% [markdown]
# > **Predict.** *cat* is token 2. From the maps just printed: which two rows hold its copies?
# > Find them in the upper picture. In the lower one every expert has only four places; all first
# > choices are served before any second choice, in reading order. Who is left out?

# %%
limit = Capacity(factor=1.0, priority="choice")  # places = factor * N * K / E
short = capacity.make_plan(expert_NK, logit_NE, prob_NE, limit)[1]
figure, axes = plt.subplots(2, 1, figsize=(7.6, 8.6))
pictures.plot_dispatch(axes[0], expert_NK, plan, words)
axes[0].set_title("a place for every choice", fontsize=10)
pictures.plot_dispatch(axes[1], expert_NK, short, words)
axes[1].set_title(f"at most {limit.places(N, K, E)} places for each expert", fontsize=10)
figure.tight_layout()

# %% [markdown]
# Solid arrows are first choices, dashed ones second choices. A cross is a **dropped** choice: it
# has no row, its slot is `R`, and it adds nothing to the output. (Who should be dropped is
# a question of its own; `moe_numpy/moe/capacity.py` has several answers.)
#
# With these maps, each direction is a single indexing expression. *Dispatch* reads tokens into
# rows, *combine* reads the experts' answers back and weighs them:
#
# ```text
# x_RC[r] = x_NC[token_R[r]]
# y_NC[n] = sum over k of gate_NK[n, k] * y_RC[slot_NK[n, k]]
# ```
#
# Here `y_RC`, shape `(R, C)`, are the answers. For a dropped choice the slot is `R`, one too far:
# think of one more row there, all zeros (the package appends it). Between the two each expert sees
# its own slice of rows. (The experts are those that section 5 drew.)

# %%
cfg_short = MoEConfig(num_experts=E, top_k=K, hidden=5, capacity=limit)
x_RC = dispatch.dispatch_forward(x_NC, short)[0]
y_RC = experts.experts_forward(x_RC, experts_drawn, cfg, short.offsets)[0]
y_NC, combine_cache = dispatch.combine_forward(y_RC, gate_NK, short)
R, loop_y_NC = len(short.token_R), np.zeros((N, C))
for n in range(N):
    for k in range(K):
        if short.slot_NK[n, k] < R:
            loop_y_NC[n] += gate_NK[n, k] * y_RC[short.slot_NK[n, k]]
whole = moe_forward(x_NC, layer.MoEParams(params, experts_drawn), cfg_short)[0]
print("rows equal:", all(np.array_equal(x_RC[r], x_NC[short.token_R[r]]) for r in range(R)))
print(f"combine and loops differ by {np.abs(y_NC - loop_y_NC).max():.1e}")
print(f"our six steps and moe_forward differ by {np.abs(whole - y_NC).max():.1e}")

# %% [markdown]
# ### The way back
#
# Combine is linear in the gates and linear in the rows. Write out one channel and read off the
# slopes:
#
# ```text
# y[n, c] = sum over k of gate[n, k] * y_RC[slot[n, k], c]
#
# dgate[n, k] = sum over c of dy[n, c] * y_RC[slot[n, k], c]     as in 4.1
#
# dy_RC[r, c] = sum over all (n, k) with slot[n, k] = r of gate[n, k] * dy[n, c]
#             = gate[n, k] * dy[n, c]     for the one choice (n, k) that row r serves:
#                                         n = token_R[r],  n * K + k = choice_R[r]
# ```
#
# Dispatch *copies*: token `n` went to several rows, and each copy has its own effect on the loss.
# The effects add up. **The gradient of a copy is a sum:**
#
# ```text
# x_RC[r, c]  = x_NC[token_R[r], c]
# dx_NC[n, c] = sum over all r with token_R[r] = n of dx_RC[r, c]
#             = sum over k of dx_RC[slot[n, k], c]
# ```
#
# The first form adds rows up where they came from (a *scatter-add*); the second reads them (a
# *gather*). The package uses the second: reading never collides. A dropped choice has no row, so
# it sends nothing back and its gate hears `dgate = 0`.

# %%
dy_NC, dx_RC = rng.normal(size=(N, C)), rng.normal(size=(R, C))
dy_RC, dgate_NK = dispatch.combine_backward(dy_NC, combine_cache)
dx_NC = dispatch.dispatch_backward(dx_RC, (short,))
loop_dy_RC, loop_dgate_NK, loop_dx_NC = np.zeros((R, C)), np.zeros((N, K)), np.zeros((N, C))
for r in range(R):
    n, k = divmod(short.choice_R[r], K)
    for c in range(C):
        loop_dgate_NK[n, k] += dy_NC[n, c] * y_RC[r, c]
        loop_dy_RC[r, c] = gate_NK[n, k] * dy_NC[n, c]
        loop_dx_NC[n, c] += dx_RC[r, c]
print(f"dgate differs by {np.abs(dgate_NK - loop_dgate_NK).max():.1e}")
print(f"dy_RC differs by {np.abs(dy_RC - loop_dy_RC).max():.1e}")
print(f"dx_NC differs by {np.abs(dx_NC - loop_dx_NC).max():.1e}")

# %% [markdown]
# > **Predict.** A dropped choice has `dgate = 0`. Is the gradient of its *logit* zero too? (4.4
# > has the answer.)

# %%
dlogit_NE = router.renormalized_gate_backward(dgate_NK, gate_cache)
for n, k in np.argwhere(short.slot_NK == R):
    e = expert_NK[n, k]
    print(f"{words[n]}, choice {k}, expert {e}:", end=" ")
    print(f"dgate {dgate_NK[n, k]}, dlogit {dlogit_NE[n, e]:.2e}")

# %% [markdown]
# It is not zero. The dropped choice took part in the softmax, and `dz = gate * (0 - m)`: its
# logit hears how the *others* fared.
#
# ## 7. The audit: who is taught by which loss?
#
# Now we put the pieces together. A layer with learned noise on its logits (its noise weights are
# a second matrix, see `moe_numpy/moe/router.py`) meets one batch of random tokens. Five loss
# terms are sent back, *each alone*:
#
# - **task**: the mean squared error of the layer's output;
# - **Switch loss**: for each expert its share of the choices times its mean probability (of the
#   noisy logits), added up, times the number of experts;
# - **importance CV²**: how unequal the sums of the experts' gates are (CV² is their variance over
#   their squared mean);
# - **load CV²**: how unequal the *chances* to be chosen are, over new draws of the noise;
# - **z-loss**: the square of `log(sum over e of exp(logit))`, averaged over the tokens. It keeps
#   logits small.
#
# The middle three are *balance losses* (papers also say *load-balancing* or *auxiliary* losses; the
# package returns their weighted sum as `aux`), the last one is a regularizer. Here we need only
# what the four look at: probabilities, gates, noisy logits, logits. (`moe_numpy/moe/balance.py` has
# them all.) We ask which parameters each can move at all.
#
# > **Predict.** Draw the table for renormalized top-1 gates: five rows (losses), four columns
# > (router weights, noise weights, the experts' first and second matrix). Mark the zeros. Then do
# > it for raw top-1. When all experts are chosen, one more loss falls silent: which one, and why?

# %%
found = audit.audit()
figure, axes = plt.subplots(2, 2, figsize=(8.8, 7.6))
for ax, gate, norm, refused in zip(axes.flat, audit.GATES, found.norm, found.refused, strict=True):
    pictures.plot_audit(ax, norm, refused, audit.TERMS, audit.GROUPS, gate)
figure.tight_layout()

# %% [markdown]
# Each number is the size (Euclidean norm) of the gradient that arrives; black is zero. A star marks
# a pairing that the configuration refuses, since it has no effect or is not defined. (The Switch
# loss of a layer that uses all experts has no effect either, but is allowed.)
#
# - **Renormalized top-1, first row.** The task trains the experts and *nothing* in the router.
#   The importance is dead as well: all gates are one, whatever the router says. But the Switch
#   loss, the load and the z-loss are alive. This router is steered by balance alone: it can learn
#   to spread the tokens evenly *without ever hearing whether an expert is any good at them*. A
#   perfect load is no proof of health.
# - **Raw top-1.** One change in the gate, and the same router hears the task.
# - **The experts' columns.** Balance losses look at the router only; they never touch an expert.
# - **z-loss, noise.** The z-loss looks at the logits before noise.
# - **All experts.** The Switch loss is silent: every expert gets the same share, so `dp_e` is the
#   same for all, equals its mean `m`, and `dp_e - m` is zero (4.2). The load is not defined: nobody
#   can be left out.
#
# Which zeros are exact in floating point, and which only up to rounding?

# %%
small = found.norm < pictures.ROUNDING
print("zeros:", small.sum(), " of them exactly 0.0:", (found.norm == 0).sum())
for g, t, p in np.argwhere(small & (found.norm > 0)):
    group = audit.GROUPS[p].replace("\n", " ")
    print(f"{audit.GATES[g]}, {audit.TERMS[t]}, {group}: {found.norm[g, t, p]:.1e}")

# %% [markdown]
# Where a path does not exist, the zero is exact. It is exact, too, where a number is subtracted
# from itself, as in the renormalized top-1 gate: `1 * (dgate - dgate)`. Where numbers cancel that
# were rounded on different ways, a remainder is left: for all experts the pushes cancel within the
# softmax. If you look for dead parameters in a program of your own, compare with a small number,
# not with zero.
#
# ## What you can do now
#
# - You can compute gates in both orders, and prove that the orders agree.
# - You can derive the gradient of a gate, raw or renormalized, and name the logits that get none.
# - You know why the renormalized top-1 gate is a trap, and how to find it: look at the gradient
#   of the router, not at the load.
# - You can say what happens at a tie, what a finite difference makes of it, and why a gradient
#   check has to count changed decisions.
# - You can read a plan and send gradients back along it.
#
# ## Exercises
#
# Replace the `raise` line with your code and run the cell. The line printed below says what is
# right, or what went wrong. The check uses other sizes than this notebook: take every size from
# the arguments (`dx_RC.shape[1]`, `prob_NE.shape`, `expert_NK.shape`), not from the `N`, `C`, `E`,
# `K` or `R` above.
#
# **1. Scatter-add** (10 minutes). The package sends the rows' gradients back by *reading*, with
# `slot_NK`. Write the other form of section 6, which *adds* each row where its token is, with
# `token_R` alone. `dx_RC` is `(R, C)`, `token_R` is `(R,)`, and you return `dx_NC`, `(N, C)`. A
# token may have fewer than `K` rows, or none.


# %%
def my_dispatch_backward(dx_RC, token_R, N):
    raise NotImplementedError("add up the rows of each token")


print(exercises_06.check_dispatch_backward(my_dispatch_backward))

# %% [markdown]
# <details><summary>Hint</summary>Start with zeros of shape <code>(N, dx_RC.shape[1])</code>. A
# token's number occurs several times in <code>token_R</code>. Try on paper what <code>a =
# np.zeros(2); a[[0, 0]] += 1</code> leaves in <code>a</code>, then run it.</details>
#
# **2. The other road** (25 minutes). Section 3 has two orders. The package chooses first, and
# goes back through a softmax of the chosen. Go back along the other one: `prob = softmax(logit)`,
# then `gate = prob[chosen] / sum`. You get `dgate_NK` and `expert_NK`, `(N, K)`, and `prob_NE`,
# `(N, E)`; return `dlogit_NE`, `(N, E)`. Divide by the sum, and mind that the sum moves too.


# %%
def my_divided_gate_backward(dgate_NK, prob_NE, expert_NK):
    raise NotImplementedError("go back through the division, then through the softmax")


print(exercises_06.check_divided_gate_backward(my_divided_gate_backward))

# %% [markdown]
# <details><summary>Hint</summary>Let <code>s</code> be the sum of the chosen probabilities. The
# slope of <code>p_i / s</code> in a chosen <code>p_j</code> is <code>([i = j] - gate_i) / s</code>
# by the quotient rule. Put what you get under the chosen experts of
# <code>np.zeros_like(prob_NE)</code> (<code>np.put_along_axis</code>) and use 4.2.</details>
#
# **3. Another gate** (40 minutes). Some recent models score each expert by itself: `s =
# sigmoid(logit[chosen])` with `sigmoid(z) = 1 / (1 + exp(-z))`, and `gate = s / sum of s`. Derive
# the gradient and write it down. You get `dgate_NK`, `logit_NE` and `expert_NK`; return
# `dlogit_NE`. When it is right: is this gate alive for `K = 1`? And without the division?


# %%
def my_sigmoid_gate_backward(dgate_NK, logit_NE, expert_NK):
    raise NotImplementedError("derive the gradient of the normalized sigmoid gate")


print(exercises_06.check_sigmoid_gate_backward(my_sigmoid_gate_backward))

# %% [markdown]
# <details><summary>Hint</summary>The slope of the sigmoid is <code>s (1 - s)</code>. The division
# is the one of exercise 2, with <code>s</code> in place of <code>p</code>. For the two questions:
# what is <code>s / s</code>?</details>
#
# ## Where to go next
#
# - **Chapter 07, Collapse**: the gradient reaches the router now. What does it do there? The
#   chosen learn, and so are chosen again.
# - In the package: `moe_numpy/moe/router.py` has both gates, each backward under its forward;
#   `moe_numpy/moe/layer.py` has all six steps on one page.
# - Sources: Shazeer et al. 2017 (renormalized top-k gates with noise), Fedus et al. 2022 (Switch,
#   raw top-1), Lepikhin et al. 2020 (GShard, top-2).
