"""Line charts as SVG in HTML, without a package: axes with rounded numbers, logarithmic if asked for, and a legend.

The page that holds them gives the colours: the classes that the series name, and axis, grid and mark for the rest.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 360, 240  # units of the SVG, which is as wide as the page lets it be: on a phone about one pixel each
LEFT, RIGHT, TOP, BOTTOM = 62, 8, 10, 40  # margins
MOST_POINTS = 500  # of a line
KEY = '<svg viewBox="0 0 20 8" aria-hidden="true"><path class="{}" d="M0 4H20"/></svg>'
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Series(NamedTuple):
    """A line through (xs, ys), of which pairs with a None or nan are left out; points: with a dot at each."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: str = "c0"  # a class of the page
    points: bool = False


class Axis:
    """One axis: from values to places between two ends, and its ticks."""

    def __init__(self, values: Sequence[float], ends: tuple[float, float], log: bool):
        self.log, self.ends = log, ends
        low, high = self._scaled(min(values)), self._scaled(max(values))
        margin = 0.03 * (high - low) or 0.5
        self.low, self.high = low - margin, high + margin

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return self.ends[0] + share * (self.ends[1] - self.ends[0])

    def ticks(self) -> list[tuple[float, str]]:
        """Three to eight round values and their names."""
        decades = self.high - self.low
        if not self.log or decades < 0.8:
            low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
            step = 10 ** math.floor(math.log10((high - low) / 3))
            step *= max(m for m in (1, 2, 5) if (high - low) / (m * step) >= 3)
            return [(i * step, f"{i * step:,.10g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        digits = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 3 else (1,)
        powers = (p for p in range(math.floor(self.low), math.floor(self.high) + 1) if p % math.ceil(decades / 7) == 0)
        values = [(p, m) for p in powers for m in digits if self.low <= p + math.log10(m) <= self.high]
        return [(m * 10.0**p, _power(p, m)) for p, m in values]


def _power(p: int, m: int) -> str:
    """m * 10^p, in words of five places at most."""
    if -3 <= p <= 4:
        return f"{m * 10.0**p:,.10g}"
    return ("" if m == 1 else f"{m}·") + "10" + str(p).translate(SUPERSCRIPT)


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool | None = False,
    mark: float | None = None,
) -> str:
    """A <figure> with the chart and its legend. title says in words what is to be seen; mark is an x with a dashed line.

    On a logarithmic axis, values that are not positive are left out. log_y=None: logarithmic if every value is positive.
    """
    if log_y is None:
        log_y = all(y > 0 for one in series for y in one.ys if y is not None and math.isfinite(y))
    lines = [(one, _pairs(one, log_x, log_y)) for one in series]
    lines = [(one, pairs) for one, pairs in lines if pairs]
    if not lines:
        return f"<p>{escape(title)}: no value to draw.</p>"
    everything = [pair for _, pairs in lines for pair in pairs]
    x = Axis([pair[0] for pair in everything] + ([] if mark is None else [mark]), (LEFT, WIDTH - RIGHT), log_x)
    y = Axis([pair[1] for pair in everything], (HEIGHT - BOTTOM, TOP), log_y)
    parts = [*_axes(x, y, x_label, y_label), *(_line(one, pairs, x, y) for one, pairs in lines)]
    if mark is not None:
        parts.append(f'<path class="mark" d="M{x.place(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    keys = "".join(f"<li>{KEY.format(one.colour)}{escape(one.name)}</li>" for one, _ in lines)
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}'
        f'</svg><figcaption>{escape(title)}</figcaption><ul class="legend">{keys}</ul></figure>'
    )


def _pairs(one: Series, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    """What can be drawn of a series, thinned evenly to MOST_POINTS."""
    pairs = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if y is not None and math.isfinite(y)]
    pairs = [(x, y) for x, y in pairs if (x > 0 or not log_x) and (y > 0 or not log_y)]
    every = max(1, math.ceil(len(pairs) / MOST_POINTS))
    return pairs[::every] + (pairs[-1:] if every > 1 else [])


def _line(one: Series, pairs: list[tuple[float, float]], x: Axis, y: Axis) -> str:
    places = [(f"{x.place(a):.1f}", f"{y.place(b):.1f}") for a, b in pairs]
    path = f'<path class="{one.colour}" d="M{"L".join(f"{a} {b}" for a, b in places)}"/>'
    dots = places if one.points or len(places) == 1 else []
    return path + "".join(f'<circle class="{one.colour}" cx="{a}" cy="{b}" r="2.5"/>' for a, b in dots)


def _axes(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value, name in x.ticks():
        parts.append(f'<path class="grid" d="M{x.place(value):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x.place(value):.1f}" y="{bottom + 14}" text-anchor="middle">{name}</text>')
    for value, name in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y.place(value):.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y.place(value) + 4:.1f}" text-anchor="end">{name}</text>')
    middle = (TOP + bottom) / 2
    return [
        *parts,
        f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
