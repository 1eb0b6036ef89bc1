"""Plots as SVG files, of two kinds: bars that compare tools, and lines that show how something grows.

Each file has a background of its own and follows the reader's choice of a light or dark one. Text is text, so it can be
searched and scaled. A plot is a grid of panels with a title and a sentence that says how to read it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Callable, Optional, TypeVar

Panel = TypeVar("Panel")

WIDTH = 880
MARGIN, GAP = 24, 28
STYLE = """
  .ground { fill: #ffffff } .title { fill: #1f2328; font-weight: 600 } .text { fill: #1f2328 } .soft { fill: #59636e }
  .line { stroke: #d1d9e0 } .axis { stroke: #818b98 }
  .ours { fill: #0969da } .theirs { fill: #a9b4c0 }
  .c0 { color: #0969da } .c1 { color: #bc4c00 } .c2 { color: #1a7f37 } .c3 { color: #8250df }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } .title, .text { fill: #f0f6fc } .soft { fill: #9198a1 }
    .line { stroke: #2a313a } .axis { stroke: #656c76 }
    .ours { fill: #4493f8 } .theirs { fill: #59636e }
    .c0 { color: #4493f8 } .c1 { color: #f0883e } .c2 { color: #3fb950 } .c3 { color: #ab7df8 }
  }
  .title { font-size: 17px } .head { font-weight: 600 } .small { font-size: 12px }
"""


@dataclass
class Bars:
    """One value for each name; the shorter the better. A note follows the value."""
    title: str
    unit: str
    values: dict[str, float]
    ours: str = "petra"


@dataclass
class Lines:
    """Curves of points (x, y) by their names. Marks of the x axis are those of `marks`, spaced by their logarithms."""
    title: str
    unit: str
    curves: dict[str, list[tuple[float, float]]]
    x_label: str
    logarithmic: bool = True
    low: Optional[float] = 0  # where the y axis begins


class Canvas:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "text", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" class="{kind}"/>')


def bars(title: str, sentence: str, panels: list[Bars], columns: int = 2) -> str:
    rows = max(len(panel.values) for panel in panels)
    height = 34 + rows * 24 + 8

    def draw(canvas: Canvas, panel: Bars, x: float, y: float, width: float) -> None:
        canvas.text(x, y + 14, f"{panel.title}, {panel.unit}", "text head")
        name_width = 8 + 7.4 * max(map(len, panel.values))
        most = max(panel.values.values())
        ours = panel.values.get(panel.ours)
        room = width - name_width - 112
        for number, (name, value) in enumerate(sorted(panel.values.items(), key=lambda pair: pair[1])):
            middle = y + 34 + number * 24
            mine = name == panel.ours
            canvas.text(x, middle + 9, name, "text head" if mine else "text")
            canvas.box(x + name_width, middle - 3, max(2, room * value / most), 16, "ours" if mine else "theirs")
            said = number_text(value) + ("" if mine or not ours else f" ({value / ours:{'.2f' if value < 2 * ours else '.1f'}} x)")
            canvas.text(x + name_width + max(2, room * value / most) + 7, middle + 9, said, "text small" if not mine else "text head")

    return grid(title, sentence, panels, columns, height, draw)


def lines(title: str, sentence: str, panels: list[Lines], columns: int = 2) -> str:
    names: list[str] = []
    for panel in panels:
        names += [name for name in panel.curves if name not in names]
    plot_height = 170.0
    height = 34 + plot_height + 44

    def draw(canvas: Canvas, panel: Lines, x: float, y: float, width: float) -> None:
        canvas.text(x, y + 14, f"{panel.title}, {panel.unit}", "text head")
        left, right, top = x + 46, x + width - 12, y + 30
        bottom = top + plot_height
        points = [point for curve in panel.curves.values() for point in curve]
        xs = sorted({point[0] for point in points})
        ticks = nice_ticks(max(point[1] for point in points))
        scale = (lambda value: math.log(value)) if panel.logarithmic else (lambda value: value)
        first, last = scale(xs[0]), scale(xs[-1])

        def at(point: tuple[float, float]) -> tuple[float, float]:
            share = (scale(point[0]) - first) / (last - first or 1)
            return left + share * (right - left), bottom - point[1] / ticks[-1] * plot_height

        for tick in ticks:
            level = at((xs[0], tick))[1]
            canvas.line(left, level, right, level, "line" if tick else "axis")
            canvas.text(left - 6, level + 4, number_text(tick), "soft small", "end")
        taken = -math.inf
        for value in xs:
            place = at((value, 0))[0]
            if place - taken >= 26 or value == xs[-1]:
                canvas.text(place, bottom + 17, number_text(value), "soft small", "middle")
                taken = place
        canvas.text((left + right) / 2, bottom + 35, panel.x_label, "soft small", "middle")
        for name, curve in panel.curves.items():
            kind = f"c{names.index(name) % 4}"
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(at, curve))
            canvas.parts.append(f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="2.5" '
                                f'stroke-linejoin="round" class="{kind}"/>')
            canvas.parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="currentColor" class="{kind}"/>'
                             for px, py in map(at, curve)]

    return grid(title, sentence, panels, columns, height, draw, names)


def grid(title: str, sentence: str, panels: list[Panel], columns: int, height: float,
         draw: Callable[[Canvas, Panel, float, float, float], None], names: Optional[list[str]] = None) -> str:
    """Lays the panels out, below the title, the sentence and the names of the curves if there are several."""
    canvas = Canvas()
    top = 66.0
    canvas.text(MARGIN, 34, title, "title")
    canvas.text(MARGIN, 56, sentence, "soft")
    if names:
        x = float(MARGIN)
        for number, name in enumerate(names):
            length = 42 + 6.4 * len(name)
            if x > MARGIN and x + length > WIDTH:
                x, top = float(MARGIN), top + 20
            canvas.parts.append(f'<line x1="{x:.1f}" y1="{top + 14:.1f}" x2="{x + 18:.1f}" y2="{top + 14:.1f}" '
                                f'stroke="currentColor" stroke-width="3" class="c{number % 4}"/>')
            canvas.text(x + 24, top + 18, name, "text small")
            x += length
        top += 34
    width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    for number, panel in enumerate(panels):
        draw(canvas, panel, MARGIN + number % columns * (width + GAP), top + number // columns * (height + 12), width)
    total = top + -(-len(panels) // columns) * (height + 12) + 8
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total:.0f}" width="{WIDTH}" height="{total:.0f}" role="img" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{total:.0f}" rx="8" class="ground"/>', *canvas.parts, "</svg>", ""])


def nice_ticks(most: float) -> list[float]:
    """Four or five round numbers from 0 to at least the most."""
    step = 10 ** math.floor(math.log10(most / 4)) if most > 0 else 1.0
    for factor in (1, 2, 2.5, 5, 10):
        if step * factor * 4 >= most:
            step *= factor
            break
    count = math.ceil(most / step - 1e-9) if most > 0 else 1
    return [number * step for number in range(count + 1)]


def number_text(value: float) -> str:
    """Three digits that count."""
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}".rstrip("0").rstrip(".") if value >= 0.1 else f"{value:.3f}".rstrip("0").rstrip(".")
