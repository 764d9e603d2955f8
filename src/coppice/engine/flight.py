"""A flight: granted rows on their way through the model, and what is to come of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from coppice.engine.messages import StepTree
from coppice.engine.sequence import Sequence
from coppice.kernels.rows import Rows
from coppice.scheduling import Grant
from coppice.speculation import ROOT, DraftTree

if TYPE_CHECKING:
    from coppice.engine.step import StepRunner


@dataclass(slots=True)
class Walk:
    """A sequence whose next tokens are being chosen.

    Attributes:
        place: its last token's place among the step's logits.
        tree: what was speculated.
        node: how far the walk has come.
        path: tree nodes accepted so far.
    """

    sequence: Sequence
    place: int
    tree: DraftTree | None
    node: int = ROOT
    path: tuple[int, ...] = ()

    def follow(self, token: int) -> bool:
        """Go to the node that holds the chosen token; False where the tree has none."""
        child = None if self.tree is None else self.tree.child(self.node, token)
        if child is None:
            return False
        self.node = child
        self.path = (*self.path, child)
        self.sequence.accepted += 1
        return True


class Ran(NamedTuple):
    """A sequence that had rows in a step.

    Attributes:
        end: tokens whose KV it had after it.
        rows: to get there.
        guesses: rows of its tree.
    """

    sequence: Sequence
    end: int
    rows: int
    guesses: int


def largest_tree(walks: Iterable[Walk]) -> StepTree | None:
    """The largest tree of a step, to be shown; None where nothing was speculated."""
    found = [(walk.tree, walk.path) for walk in walks if walk.tree is not None]
    if not found:
        return None
    tree, path = max(found, key=lambda each: len(each[0]))
    return StepTree(source=tree.source, parents=tree.parents, accepted=list(path))


@dataclass(slots=True, eq=False)
class Flight:
    """Rows that go through the model together.

    Until it lands (`StepRunner.take`) its sequences are what they were when it was laid out,
    and nobody else may have the pages it reads and writes.

    Attributes:
        runner: computes and takes it.
        grants: what it was laid out from.
        ran: who has rows in it.
        walks: who is given tokens from it.
        num_rows: guesses counted.
        rows: the arrays; None where nobody has rows.
        found: of each walk's nodes the likeliest tokens or the logits, once computed.
        error: why there are none.
        num_chosen: tokens taken.
        began_s: when it was laid out, on the engine's clock.
        share: part of the threads it has.
        share_s: seconds of the machine it has had.
    """

    runner: StepRunner
    grants: list[Grant]
    ran: list[Ran] = field(default_factory=list)
    walks: list[Walk] = field(default_factory=list)
    num_rows: int = 0
    rows: Rows | None = None
    found: list[int] | Tensor | None = None
    error: BaseException | None = None
    num_chosen: int = 0
    began_s: float = 0.0
    share: float = 1.0
    share_s: float = 0.0

    def add(self, ran: Ran, walk: Walk | None) -> None:
        """A sequence comes along."""
        self.ran.append(ran)
        self.num_rows += ran.rows + ran.guesses
        if walk is not None:
            self.walks.append(walk)

    def become(self, parts: Iterable[Flight]) -> None:
        """What was to be done together was done by these."""
        flown = list(parts)
        self.ran = [ran for part in flown for ran in part.ran]
        self.walks = [walk for part in flown for walk in part.walks]
        self.num_rows = sum(part.num_rows for part in flown)
        self.num_chosen = sum(part.num_chosen for part in flown)
