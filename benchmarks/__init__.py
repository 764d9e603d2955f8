"""One command per claim: ``python -m benchmarks.NAME [--quick]``.

Each prints a table and, as its last line, JSON with metrics and goals. Ratios are taken
against a peer or a limit measured in the same run.
"""
