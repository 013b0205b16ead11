"""The figures as one small SVG, readable on light and on dark ground."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import product

from bench.cold_start.results import WAYS, Results, Scene

INK = "#808080"
"""Between black and white: seen on both."""
COLOURS = ("#d9822b", "#e0b040", "#c0504d", "#2f80c9", "#45b3c8", "#5aa469")
"""Of the ways, in their order."""
WIDTH, HEIGHT = 380, 210
"""Of one panel, with its labels."""
LEFT, TOP, RIGHT, BOTTOM = 52, 26, 8, 30
LEGEND = 46
LINE = 18
COLUMNS = 2


def svg(results: Results) -> str:
    """One panel for each SDK and number of flags; a dot is p50, the end of its line p99.

    Times are those of functions that start one by one, among others that only ask.
    """
    scenes = results.scenes()
    panels = list(dict.fromkeys((scene.sdk, scene.flags) for scene in scenes))
    counts = sorted({scene.processes for scene in scenes})
    scale = _Scale(results, scenes)
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = WIDTH * min(COLUMNS, len(panels)), HEIGHT * rows + LEGEND
    width = max(width, WIDTH + 100)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="11" '
            f'fill="{INK}">'
        ),
        "<title>Time from the construction of an SDK to its first flag</title>",
        *_legend(width, height - LEGEND + 12),
    ]
    for index, (sdk, flags) in enumerate(panels):
        x, y = WIDTH * (index % COLUMNS), HEIGHT * (index // COLUMNS)
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _axes(f"{sdk}, {flags} flags: time to the first flag", counts, scale)
        for place, count in enumerate(counts):
            scene = Scene(sdk, flags, count)
            parts += _marks(results, scene, _middle(place, counts), scale)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


class _Scale:
    """Milliseconds to height, logarithmic, in whole powers of ten."""

    def __init__(self, results: Results, scenes: Sequence[Scene]) -> None:
        starts = [results.starts(*each) for each in product(scenes, WAYS)]
        times = [time for own in starts if own for time in (own.p50_ms, own.p99_ms)]
        times = [time for time in times if 0 < time < math.inf] or [1.0]
        self.low = math.floor(math.log10(min(times)))
        self.high = max(self.low + 1, math.ceil(math.log10(max(times))))

    def y(self, milliseconds: float) -> float:
        """Where a time stands in a panel."""
        share = (math.log10(milliseconds) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes(title: str, counts: Sequence[int], scale: _Scale) -> Iterator[str]:
    yield f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>'
    for power in range(scale.low, scale.high + 1):
        y = scale.y(10**power)
        yield (
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{INK}" '
            'stroke-opacity="0.3"/>'
        )
        label = f"{10 ** (power - 3):g} s" if power >= 3 else f"{10**power:g} ms"
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for place, count in enumerate(counts):
        x, y = _middle(place, counts), HEIGHT - BOTTOM + 16
        label = f"{count} at once" if count > 1 else "1 alone"
        yield f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{label}</text>'


def _middle(place: int, counts: Sequence[int]) -> float:
    return LEFT + (place + 0.5) * (WIDTH - LEFT - RIGHT) / len(counts)


def _marks(results: Results, scene: Scene, middle: float, scale: _Scale) -> Iterator[str]:
    step = 13
    for place, (way, colour) in enumerate(zip(WAYS, COLOURS, strict=True)):
        own = results.starts(scene, way)
        if own is None or math.isinf(own.p99_ms):
            continue
        x = middle + (place - (len(WAYS) - 1) / 2) * step
        low, high = scale.y(own.p50_ms), scale.y(own.p99_ms)
        told = f"{way}: p50 {own.p50_ms:.0f} ms, p99 {own.p99_ms:.0f} ms"
        yield (
            f'<g stroke="{colour}" stroke-width="2"><title>{escape(told)}</title>'
            f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {high:.1f}h8"/>'
            f'<circle cx="{x:.1f}" cy="{low:.1f}" r="3" fill="{colour}"/></g>'
        )


def _legend(width: float, top: float) -> Iterator[str]:
    across = 3
    for place, (way, colour) in enumerate(zip(WAYS, COLOURS, strict=True)):
        x = 14 + (place % across) * (width - 14) / across
        y = top + (place // across) * LINE
        yield f'<circle cx="{x:.1f}" cy="{y - 4}" r="4" fill="{colour}"/>'
        yield f'<text x="{x + 9:.1f}" y="{y}">{escape(way)}</text>'
