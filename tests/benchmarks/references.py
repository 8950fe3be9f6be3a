"""PyTorch models that compute the same functions as the package's, written as one would there.

A dense GPT after nanoGPT, and four ways to run its experts: the loop of the textbooks, rows sorted
by expert, one batched product over padded rows, and PyTorch's product of groups of rows. Each
module says by `ties` which view of which of its parameters is which array of the package; weights
go in and gradients come out through them.
"""

import torch
from torch import nn
from torch.nn import functional as F

SAME = lambda tensor: tensor  # noqa: E731
TURNED = lambda tensor: tensor.transpose(-1, -2)  # noqa: E731 (torch keeps weights as (out, in))


class Tie:
    """One array of the package and the parameters that hold it, each through a view."""

    def __init__(self, parameters, view=SAME):
        self.stacked = isinstance(parameters, list)
        self.parameters = parameters if self.stacked else [parameters]
        self.view = view

    def load(self, array):
        """Copy an array of the package into the parameters."""
        parts = torch.as_tensor(array)
        for parameter, part in zip(
            self.parameters, parts if self.stacked else [parts], strict=True
        ):
            self.view(parameter.data).copy_(part)

    def gradient(self):
        """Return the gradient as the package arranges it; zero where none was computed."""
        return self._arranged(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        )

    def value(self):
        """Return a copy of the parameters as the package arranges them."""
        return self._arranged([p.data for p in self.parameters]).copy()

    def _arranged(self, tensors):
        views = [self.view(tensor) for tensor in tensors]
        return (torch.stack(views) if self.stacked else views[0]).contiguous().numpy()


class MLP(nn.Module):
    """The dense feed-forward."""

    def __init__(self, width, hidden):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        """Widen, activate, narrow."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

    def ties(self):
        """Name the arrays of the package."""
        return {"in_CF": Tie(self.c_fc.weight, TURNED), "out_FC": Tie(self.c_proj.weight, TURNED)}


class Experts(nn.Module):
    """A router and its experts; the subclasses run them."""

    def __init__(self, width, moe):
        super().__init__()
        self.experts, self.top_k = moe["num_experts"], moe["top_k"]
        self.gate = nn.Linear(width, self.experts, bias=False)
        self.raw = moe["gate_weights"] == "raw"

    def route(self, x_NC):
        """Choose the experts of every token, and weigh them."""
        prob_NE = F.softmax(self.gate(x_NC), dim=-1)
        gate_NK, expert_NK = torch.topk(prob_NE, self.top_k, dim=-1)
        if not self.raw:
            gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        return gate_NK, expert_NK

    def forward(self, x):
        """Route the rows and let the subclass run them."""
        x_NC = x.reshape(-1, x.shape[-1])
        return self.run(x_NC, *self.route(x_NC)).reshape(x.shape)

    def ties(self):
        """Name the arrays of the package."""
        return {
            "router.w_CE": Tie(self.gate.weight, TURNED),
            **{f"experts.{name}": tie for name, tie in self.expert_ties().items()},
        }


class TextbookExperts(Experts):
    """A list of MLPs, and a loop that picks each one's tokens with a mask."""

    def __init__(self, width, moe):
        super().__init__(width, moe)
        self.mlps = nn.ModuleList(MLP(width, moe["hidden"]) for _ in range(self.experts))

    def run(self, x_NC, gate_NK, expert_NK):
        """Add each expert's output, times its gate, to the rows of its tokens."""
        y_NC = torch.zeros_like(x_NC)
        for e, mlp in enumerate(self.mlps):
            token, choice = torch.where(expert_NK == e)
            if token.numel():
                y_NC.index_add_(0, token, mlp(x_NC[token]) * gate_NK[token, choice, None])
        return y_NC

    def expert_ties(self):
        """Name the arrays of the package: the experts are stacked there."""
        return {
            "in_ECF": Tie([mlp.c_fc.weight for mlp in self.mlps], TURNED),
            "out_EFC": Tie([mlp.c_proj.weight for mlp in self.mlps], TURNED),
        }


class StackedExperts(Experts):
    """All experts in two tensors, laid out as products want them."""

    def __init__(self, width, moe):
        super().__init__(width, moe)
        self.w_in = nn.Parameter(torch.zeros(self.experts, width, moe["hidden"]))
        self.w_out = nn.Parameter(torch.zeros(self.experts, moe["hidden"], width))

    def sort(self, expert_NK):
        """Order the choices by expert; count those of each."""
        expert_M = expert_NK.reshape(-1)
        order_M = torch.argsort(expert_M, stable=True)
        return expert_M, order_M, torch.bincount(expert_M, minlength=self.experts)

    def expert_ties(self):
        """Name the arrays of the package."""
        return {"in_ECF": Tie(self.w_in), "out_EFC": Tie(self.w_out)}


class SortedExperts(StackedExperts):
    """Rows sorted by expert, one contiguous slice each, and one way back for all."""

    def run(self, x_NC, gate_NK, expert_NK):
        """Gather once, multiply slice by slice, undo the sorting once."""
        _, order_M, counts = self.sort(expert_NK)
        token_M = order_M // self.top_k
        slices = x_NC.index_select(0, token_M).split(counts.tolist())
        done = [
            F.gelu(rows @ w_in, approximate="tanh") @ w_out
            for rows, w_in, w_out in zip(
                slices, self.w_in.unbind(), self.w_out.unbind(), strict=True
            )
            if len(rows)
        ]
        back_M = torch.empty_like(order_M)
        back_M[order_M] = torch.arange(len(order_M))
        y_NKC = torch.cat(done).index_select(0, back_M).reshape(*expert_NK.shape, -1)
        return (y_NKC * gate_NK[..., None]).sum(1)


class BatchedExperts(StackedExperts):
    """As many places for every expert as the busiest one needs, and batched products."""

    def run(self, x_NC, gate_NK, expert_NK):
        """Put the rows into their places, multiply all at once, fetch them back."""
        expert_M, order_M, counts = self.sort(expert_NK)
        places = int(counts.max())
        start_E = counts.cumsum(0) - counts
        rank_M = torch.empty_like(order_M)
        rank_M[order_M] = torch.arange(len(order_M)) - start_E[expert_M[order_M]]
        place_M = expert_M * places + rank_M
        token_M = torch.arange(len(expert_M)) // self.top_k
        padded = x_NC.new_zeros(self.experts * places, x_NC.shape[1])
        padded.index_copy_(0, place_M, x_NC.index_select(0, token_M))
        h = F.gelu(padded.reshape(self.experts, places, -1) @ self.w_in, approximate="tanh")
        y = (h @ self.w_out).reshape(self.experts * places, -1)
        y_NKC = y.index_select(0, place_M).reshape(*expert_NK.shape, -1)
        return (y_NKC * gate_NK[..., None]).sum(1)


class GroupedExperts(StackedExperts):
    """Rows sorted by expert, and PyTorch's own product of groups of rows."""

    def run(self, x_NC, gate_NK, expert_NK):
        """Gather once, multiply all groups in one call, undo the sorting once."""
        _, order_M, counts = self.sort(expert_NK)
        ends_E = counts.cumsum(0).to(torch.int32)
        rows = x_NC.index_select(0, order_M // self.top_k)
        h = F.gelu(F.grouped_mm(rows, self.w_in, offs=ends_E), approximate="tanh")
        y_MC = F.grouped_mm(h, self.w_out, offs=ends_E)
        back_M = torch.empty_like(order_M)
        back_M[order_M] = torch.arange(len(order_M))
        y_NKC = y_MC.index_select(0, back_M).reshape(*expert_NK.shape, -1)
        return (y_NKC * gate_NK[..., None]).sum(1)


EXPERTS = {
    "textbook": TextbookExperts,
    "sorted": SortedExperts,
    "batched": BatchedExperts,
    "grouped": GroupedExperts,
}


class Attention(nn.Module):
    """Causal attention with one projection for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        """Attend with PyTorch's fused kernel."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    def ties(self):
        """Name the arrays of the package: three there, slices of one here."""
        C = self.c_proj.weight.shape[0]

        def part(i):
            return lambda w: w[i * C : (i + 1) * C].T.unflatten(1, (self.heads, -1))

        return {
            "q_CHD": Tie(self.c_attn.weight, part(0)),
            "k_CGD": Tie(self.c_attn.weight, part(1)),
            "v_CGD": Tie(self.c_attn.weight, part(2)),
            "out_HDC": Tie(self.c_proj.weight, lambda w: w.T.unflatten(0, (self.heads, -1))),
        }


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm."""

    def __init__(self, config, feed):
        super().__init__()
        width = config["width"]
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=config["norm_eps"]) for _ in range(2))
        self.attn = Attention(width, config["heads"])
        self.feed = (
            EXPERTS[feed](width, config["moe"]) if config["moe"] else MLP(width, config["hidden"])
        )

    def forward(self, x):
        """Add both branches to the residual stream."""
        x = x + self.attn(self.ln_1(x))
        return x + self.feed(self.ln_2(x))

    def ties(self):
        """Name the arrays of the package."""
        return {
            **below("norm_1", norm_ties(self.ln_1)),
            **below("attention", self.attn.ties()),
            **below("norm_2", norm_ties(self.ln_2)),
            **below("feed", self.feed.ties()),
        }


class GPT(nn.Module):
    """A GPT-2 of learned positions and a tied head; with experts where the configuration has some.

    `feed` names how the experts are run.
    """

    def __init__(self, config, feed):
        super().__init__()
        width = config["width"]
        self.wte = nn.Embedding(config["vocab_size"], width)
        self.wpe = nn.Embedding(config["context"], width)
        self.blocks = nn.ModuleList(Block(config, feed) for _ in range(config["layers"]))
        self.ln_f = nn.LayerNorm(width, eps=config["norm_eps"])

    def forward(self, token):
        """Predict the next token at every position."""
        x = self.wte(token) + self.wpe(torch.arange(token.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)

    def ties(self):
        """Name the arrays of the package."""
        blocks = {}
        for i, block in enumerate(self.blocks):
            blocks |= below(f"blocks.{i}", block.ties())
        table = {"token_VC": Tie(self.wte.weight), "position_TC": Tie(self.wpe.weight)}
        return {**table, **blocks, **below("norm", norm_ties(self.ln_f))}


def norm_ties(norm):
    """Name the arrays of a norm; RMS norms have no bias."""
    bias = getattr(norm, "bias", None)
    return {"gain_C": Tie(norm.weight)} | ({} if bias is None else {"bias_C": Tie(bias)})


def below(prefix, ties):
    """Put the names under a common one."""
    return {f"{prefix}.{name}": tie for name, tie in ties.items()}
