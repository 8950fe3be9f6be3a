"""What a preset is: a published system, its configuration, and where the two part."""

from __future__ import annotations

from dataclasses import dataclass

from moe_numpy import ledger
from moe_numpy.config import ModelConfig

# Where several systems part from their papers.
DECODER = "differs: only a decoder is built; the counts are those of the encoder and the decoder."
ROTARY = "differs: rotary positions in place of a learned bias of relative positions."
POOLED = "differs: the loss is one for each layer; Hugging Face's pools the tokens of all layers."
UNSCALED = (
    "differs: attention logits are divided by the root of the head's width; in T5 they are not."
)
NO_LIMIT = "differs: evaluation limits no expert; the original raises the capacity factor to 2."


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """Where a system was published; `at` is an arXiv number, a journal or a repository."""

    authors: str
    title: str
    at: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Sizes as they were printed, in parameters, and by whom; None where nobody printed any.

    with_embedding  whether the printed active ones include an embedding that is only looked up.
    """

    total: float | None = None
    active: float | None = None
    source: str = ""
    with_embedding: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One published system.

    idea       what it is, in two or three sentences.
    model      its configuration at the published size.
    small      experts and top_k of its laptop size.
    published  its printed sizes.
    departs    where the configuration differs from the paper or its code.
    notes      what else to know about the numbers.
    latent     widths of latent attention, which the ledger counts in place of the model's own.
    encoder    whether it has an encoder of the same layers, which only the ledger counts.
    """

    name: str
    year: int
    paper: Paper
    idea: str
    model: ModelConfig
    small: tuple[int, int]
    published: Published = Published()
    departs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    latent: ledger.Latent | None = None
    encoder: bool = False

    def ledger(self) -> ledger.Ledger:
        """Count the published size, with what `ModelConfig` does not have."""
        return ledger.count(self.model, latent=self.latent, encoder=self.encoder)
