"""Small real models every test may use."""

from __future__ import annotations

from pathlib import Path

import coppice.models

DRAFT = str(Path(coppice.models.__file__).parent / "bundled" / "draft")
"""The bundled draft model: a million trained parameters, a step in well under a millisecond."""
