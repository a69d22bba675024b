"""A bar chart as SVG: horizontal bars with their value and, where there were several runs, the range."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .measure import Spread

WIDTH, LABEL_WIDTH, VALUE_WIDTH, BAR, GAP, TOP = 760, 300, 110, 22, 10, 44

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600; font-size: 14px }
.bar { fill: #9aa7b4 } .ours { fill: #2f6fd0 } .range { stroke: #1f2328; stroke-width: 1.5 } .back { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .bar { fill: #5b6672 } .ours { fill: #5b9bf5 } .range { stroke: #e6edf3 }
  .back { fill: #0d1117 }
}
"""


class Bar(NamedTuple):
    """One bar; ``ours`` gives it the other colour."""

    label: str
    value: Spread
    ours: bool = False


def draw(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """The chart as an SVG document. The axis begins at zero."""
    height = TOP + len(bars) * (BAR + GAP) + GAP
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    most = max((bar.value.high for bar in bars), default=0.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="12" y="26">{escape(title)} ({escape(unit)})</text>',
    ]
    for number, bar in enumerate(bars):
        y = TOP + number * (BAR + GAP)
        middle = y + BAR / 2
        length = room * bar.value.median / most
        kind = "bar ours" if bar.ours else "bar"
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{middle + 5}" text-anchor="end">{escape(bar.label)}</text>')
        parts.append(f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>')
        if bar.value.high > bar.value.low:
            low, high = (LABEL_WIDTH + room * v / most for v in (bar.value.low, bar.value.high))
            parts.append(f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>')
        end = LABEL_WIDTH + room * bar.value.high / most
        parts.append(f'<text x="{end + 6:.1f}" y="{middle + 5}">{figure(bar.value.median)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def figure(value: float) -> str:
    """A number with three significant digits at least."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
