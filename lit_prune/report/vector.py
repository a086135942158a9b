"""Figures as SVG: a file each, and the same inside the page, where the page's colours hold."""

import io
import re

import matplotlib
from matplotlib.figure import Figure

from lit_prune.report import drawing

THEME = {
    "#ffffff": "page",
    drawing.HALO: "halo",
    drawing.INK: "ink",
    drawing.GREY: "soft",
    drawing.GRID: "line",
    drawing.PALE: "pale",
    drawing.BLUE: "blue",
    drawing.ORANGE: "orange",
    drawing.GREEN: "green",
    drawing.VERMILLION: "vermillion",
}
"""Colours of figures by the names that `page.css` gives them, one value for light and one for dark."""

LARGEST = 400_000
"""Characters of a figure above which the page holds it as PNG: clouds of thousands of dots."""


def render_svg(figure: Figure, name: str) -> str:
    """Returns the figure as an SVG file; text stays text, equal figures are equal files.

    Args:
        figure: what to draw.
        name: of the figure; ids begin with it, so that several figures can stand in one page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(r'\bid="', f'id="{name}-', buffer.getvalue())
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)


def themed(svg: str) -> str:
    """Returns the element of an SVG file for a page: scaled to its place, in the colours that the page defines.

    >>> themed('<?xml?><svg width="9pt" height="4pt" viewBox="0 0 9 4"><path style="fill: #ffffff"/></svg>')
    '<svg viewBox="0 0 9 4"><path style="fill: var(--page)"/></svg>'
    """
    element = svg[svg.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r'^(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", element)
    element = re.sub(r'^(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", element)
    names = {colour.lower(): f"var(--{name})" for colour, name in THEME.items()}
    return re.sub(r"(?<=[:\s])#[0-9a-f]{6}\b", lambda found: names.get(found[0], found[0]), element)
