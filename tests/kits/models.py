"""Small real models every test may use."""

from __future__ import annotations

from pathlib import Path

SMALL = str(Path(__file__).parents[1] / "fixtures" / "small_model")
"""A million trained parameters with the bundled tokenizer; a step in well under a millisecond."""
