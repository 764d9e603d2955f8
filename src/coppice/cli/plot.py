"""A run as one SVG picture: queue, pages, service by tenant, latencies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from coppice.scheduling.record import Record

Line = tuple[str, Sequence[tuple[float, float]]]
"""A name and its points."""

WIDTH, HEIGHT, MARGIN = 460, 240, 46
COLOURS = ("#2f6f4f", "#c2703d", "#3d6fc2", "#8a3dc2", "#b0a02f", "#c23d6f", "#3dc2b0", "#666666")
MOST_POINTS = 400
MOST_LINES = 8


def picture(record: Record, title: str) -> str:
    """SVG text with four panels."""
    moments = record.moments
    panels = [
        _panel(
            "sequences over time (s)",
            [
                ("waiting", [(m.time_s, m.waiting) for m in moments]),
                ("running", [(m.time_s, m.running) for m in moments]),
            ],
        ),
        _panel("pages in use over time (s)", [("pages", [(m.time_s, m.pages) for m in moments])]),
        _panel("service by tenant over time (s)", list(_service(record))),
        _panel(
            "share of requests within seconds",
            [
                ("first token", _shares(a.ttft for a in record.answers if a.first_token_s)),
                ("whole answer", _shares(a.e2e for a in record.answers if a.finished)),
            ],
        ),
    ]
    places = [(0, 24), (WIDTH, 24), (0, 24 + HEIGHT), (WIDTH, 24 + HEIGHT)]
    body = "".join(
        f'<g transform="translate({x} {y})">{panel}</g>'
        for (x, y), panel in zip(places, panels, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {24 + 2 * HEIGHT}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="10" y="17" font-size="14">{escape(title)}</text>{body}</svg>\n'
    )


def _service(record: Record) -> Iterable[Line]:
    totals = {
        tenant: sum(amount for _, amount in account.served)
        for tenant, account in record.accounts.tenants.items()
    }
    for tenant in sorted(totals, key=lambda t: -totals[t])[:MOST_LINES]:
        points, total = [(0.0, 0.0)], 0.0
        for time, amount in record.accounts.tenants[tenant].served:
            total += amount
            points.append((time, total))
        yield tenant, points


def _shares(values: Iterable[float]) -> list[tuple[float, float]]:
    ordered = sorted(values)
    return [(value, (i + 1) / len(ordered)) for i, value in enumerate(ordered)]


def _panel(title: str, lines: Sequence[Line]) -> str:
    right = max((x for _, points in lines for x, _ in points), default=0.0) or 1.0
    top = max((y for _, points in lines for _, y in points), default=0.0) or 1.0
    wide, high = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    parts = [
        f'<text x="{MARGIN}" y="{MARGIN - 22}">{escape(title)}</text>',
        f'<path d="M{MARGIN} {MARGIN}V{MARGIN + high}H{MARGIN + wide}" fill="none" stroke="#888"/>',
        f'<text x="{MARGIN - 4}" y="{MARGIN + 8}" text-anchor="end">{top:.4g}</text>',
        f'<text x="{MARGIN + wide}" y="{MARGIN + high + 14}" text-anchor="end">{right:.4g}</text>',
    ]
    for i, (name, points) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        every = max(1, len(points) // MOST_POINTS)
        kept = [*points[::every], *points[-1:]]
        path = "L".join(
            f"{MARGIN + wide * x / right:.1f} {MARGIN + high * (1 - y / top):.1f}" for x, y in kept
        )
        if path:
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}"/>')
        at = MARGIN + 8 + 90 * (i % 4)
        line = MARGIN - 8 + 12 * (i // 4)
        parts.append(f'<text x="{at}" y="{line}" fill="{colour}">{escape(name[-14:])}</text>')
    return "".join(parts)
