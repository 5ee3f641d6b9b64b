"""Measured lines in, how fast they grow and a picture of them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

COLORS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f"),
    *("#000000", "#bcbd22", "#e377c2", "#00429d"),
)
WIDTH, HEIGHT = 430, 300
LEFT, TOP, BOTTOM, LEGEND = 62, 30, 42, 15

Lines = Mapping[str, Sequence[tuple[float, float]]]


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Gives the slope of the line through the logarithms: 1 where cost grows as the size does.

    None with fewer than two sizes, or where something is not above 0.
    """
    if len({x for x, _ in points}) < 2 or min(min(point) for point in points) <= 0:
        return None
    x, y = np.log(np.array(points, dtype=np.float64)).T
    # Not "-0.00" for what stays as it is.
    return round(float(np.polyfit(x, y, 1)[0]), 9) + 0.0


def svg(x_label: str, panels: Mapping[str, Lines]) -> str:
    """Draws panels side by side, both axes by logarithm.

    Args:
        x_label: What grows.
        panels: Lines by the label of the vertical axis; points that are not above 0 are left out.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    rows = max((len(lines) for lines in panels.values()), default=0)
    height = HEIGHT + rows * LEGEND
    parts = [
        f'<g transform="translate({place * WIDTH} 0)">{_panel(x_label, y_label, lines, colors)}</g>'
        for place, (y_label, lines) in enumerate(panels.items())
    ]
    width = WIDTH * max(len(panels), 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(x_label: str, y_label: str, lines: Lines, colors: Mapping[str, str]) -> str:
    drawn = {name: [p for p in points if min(p) > 0] for name, points in lines.items()}
    every = [point for points in drawn.values() for point in points]
    if not every:
        return ""
    low, high = np.log10(np.array(every)).min(axis=0), np.log10(np.array(every)).max(axis=0)
    low, high = low - 0.08 * (high - low + 0.1), high + 0.08 * (high - low + 0.1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low[0]) / (high[0] - low[0])
        up = (math.log10(y) - low[1]) / (high[1] - low[1])
        return LEFT + across * (WIDTH - LEFT - 14), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    parts = [f'<text x="{LEFT}" y="{TOP - 12}" font-weight="bold">{escape(y_label)}</text>']
    for x in sorted({x for x, _ in every}):
        place, _ = at(x, every[0][1])
        parts.append(_line((place, TOP), (place, HEIGHT - BOTTOM), "#eee"))
        parts.append(_text(place, HEIGHT - BOTTOM + 15, f"{x:,g}", "middle"))
    for power in range(math.ceil(low[1]), math.floor(high[1]) + 1):
        _, place = at(every[0][0], 10.0**power)
        parts.append(_line((LEFT, place), (WIDTH - 14, place), "#eee"))
        parts.append(_text(LEFT - 6, place + 4, f"{10.0**power:,g}", "end"))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - BOTTOM + 32, x_label, "middle"))
    for place, (name, points) in enumerate(drawn.items()):
        color = colors[name]
        spots = [at(*point) for point in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>' for x, y in spots]
        slope = exponent(points)
        told = name if slope is None else f"{name}, exponent {slope:.2f}"
        y = HEIGHT + place * LEGEND
        parts.append(_line((LEFT, y), (LEFT + 18, y), color))
        parts.append(_text(LEFT + 24, y + 4, told, "start"))
    return "".join(parts)


def _line(start: tuple[float, float], end: tuple[float, float], color: str) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
