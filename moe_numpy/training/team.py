"""A team: processes that take the steps of one run together.

What all members need lies in memory that they share: the parameters, the averages of the optimizer,
and the gradients that they exchange.
"""

from __future__ import annotations

import numpy as np

from moe_numpy import processes, tree
from moe_numpy.backend import Array
from moe_numpy.config import ModelConfig, TrainingConfig
from moe_numpy.training import optimizer, shards
from moe_numpy.transformer import model


class Team(processes.Processes):
    """Processes that share out the shards of a step.

    Every sum is taken in the order of one process, so the bits are the same.

    Each array of the gradients is added up by one member, its owner. The others copy their shares
    of it into `grads`: one tree for each shard that the owner did not compute, in the order of the
    shards, as `given` tells for every owner. The first of them belongs to shard 0 or 1, which is
    read before the sum takes its place.

    params, state    the arrays that were given, now in shared memory: train these
    grads            trees of gradients; after `gradients`, the first holds those of the step
    """

    who = "team"
    advice = "Go on from the last checkpoint, with fewer processes."

    def __init__(
        self,
        params: model.ModelParams,
        state: optimizer.OptimizerState,
        cfg: ModelConfig,
        training: TrainingConfig,
        size: int,
    ) -> None:
        """Copy the arrays to shared memory, for a team of `size` members.

        Raises     ValueError of `require_possible`
        """
        parts = training.shards
        require_possible(parts, size)
        super().__init__(size)
        self.cfg, self.training, self.parts = cfg, training, parts
        self.params, self.state = (tree.in_one_block(a, processes.shared) for a in (params, state))
        self.grads = [tree.room(params, processes.shared) for _ in range(parts - parts // size)]
        sizes = [leaf.size for leaf in tree.leaves(params)]
        self._by_size = sorted(range(len(sizes)), key=lambda at: -sizes[at])
        self.shares = [self._by_size[rank::size] for rank in range(size)]  # of arrays to add up
        self.own: dict[int, list[Array]] = {}  # gradients of this process's shards
        places = [tree.leaves(grads) for grads in self.grads]
        self.given: list[dict[int, list[Array]]] = []  # to each owner, of shards not its own
        for owner in range(size):
            others = [i for i in range(parts) if i % size != owner]
            self.given.append(dict(zip(others, places, strict=False)))

    def gradients(
        self,
        token_BT: Array,
        target_BT: Array,
        noise: tuple[Array | None, ...] | None = None,
    ) -> tuple[model.LossReport, Array]:
        """Do what `shards.gradients` and `optimizer.norm` do: return the report and the norm.

        The gradients are left in `grads[0]`.
        """
        parts = shards.cut(token_BT, target_BT, noise, self.parts)
        reports = self._each(_compute, parts)
        squares = zip(self._by_size, self._each(_add_up), strict=True)
        return shards.merge(tuple(reports)), np.sqrt(sum(square for _, square in sorted(squares)))

    def update(self, step: int, rate: float, scale: float = 1.0) -> None:
        """Do what `optimizer.update` does."""
        self._each(_update, step, rate, scale)


def _compute(team: Team, rank: int, parts: list[tuple]) -> list:
    """Compute the shards of this member, and put down what others add up; return the reports."""
    reports, setting = [], (team.params, team.cfg, team.training.smoothing, 1.0 / team.parts)
    for i in range(rank, team.parts, team.size):
        report, grads = shards.of_one(parts[i], *setting)
        reports.append(report)
        team.own[i] = tree.leaves(grads)
        for owner, share in enumerate(team.shares):
            if owner != rank:
                for at in share:
                    np.copyto(team.given[owner][i][at], team.own[i][at])
    return reports


def _add_up(team: Team, rank: int) -> list:
    """Add up the arrays of this member, shard by shard; return the sums of their squares."""
    squares, sums, of_shard = [], tree.leaves(team.grads[0]), team.own | team.given[rank]
    for at in team.shares[rank]:
        first, second, *others = (of_shard[i][at] for i in range(team.parts))
        total = np.add(first, second, out=sums[at])
        for part in others:
            total += part
        squares.append(np.vdot(total, total))
    team.own.clear()
    return squares


def _update(team: Team, rank: int, step: int, rate: float, scale: float) -> list:
    share = slice(rank, None, team.size)
    setting = (team.training.optimizer, step, rate, scale, share)
    optimizer.update(team.params, team.grads[0], team.state, *setting)
    return []


def require_possible(parts: int, size: int) -> None:
    """Make sure that `size` processes can share out `parts` shards here.

    Raises     ValueError if there are fewer than two, one would have no shard, or this system
               cannot have teams
    """
    processes.require_possible("team", size)
    if size > parts:
        raise ValueError(
            f"team: processes must be at most the shards of a step ({parts}), got {size}. "
            "Change either."
        )
