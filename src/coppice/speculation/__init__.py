"""Speculation: token trees, who grows them, and how much of it pays.

Owns guesses about a sequence's next tokens. Refuses to decide any token: the engine's own
sampler walks a tree with the request's own noise, so outputs never depend on this room.
"""

from coppice.speculation.control import Controller
from coppice.speculation.draft import DraftModel
from coppice.speculation.history import History
from coppice.speculation.interfaces import DraftView, Learner, Proposer
from coppice.speculation.lookup import PromptLookup
from coppice.speculation.self_draft import SelfDraft
from coppice.speculation.speculator import Speculator
from coppice.speculation.suffix import SuffixProposer
from coppice.speculation.tree import ROOT, DraftTree, Drawn

__all__ = [
    "ROOT",
    "Controller",
    "DraftModel",
    "DraftTree",
    "DraftView",
    "Drawn",
    "History",
    "Learner",
    "PromptLookup",
    "Proposer",
    "SelfDraft",
    "Speculator",
    "SuffixProposer",
]
