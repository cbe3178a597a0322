# SPDX-License-Identifier: Apache-2.0
"""Show a learning-rate sweep as lines for a terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mirrortune import __version__
from mirrortune.reports import html
from mirrortune.reports.drawing import COLOURS, Drawing, tidy

_LINES, _WIDTH = 24, 40


def sweep_lines(rates: Sequence[float], losses: Sequence[float], proposed: float | None) -> list[str]:
    """Return one line with a bar for each of a few rates; the bar's length is the loss, scaled between the extremes.

    Args:
        rates: learning rates in ascending order.
        losses: smoothed loss at each rate.
        proposed: rate to mark, or None.
    """
    step = -(-len(rates) // _LINES)
    places = range(0, len(rates), step)
    low, high = (f(losses[i] for i in places) for f in (min, max))
    nearest = None if proposed is None else min(places, key=lambda i: abs(rates[i] / proposed - 1))
    lines = [f"{'lr':>8}  {'loss':>8}"]
    for i in places:
        bar = "█" * (1 + round((_WIDTH - 1) * (losses[i] - low) / ((high - low) or 1.0)))
        mark = "  <- proposed" if i == nearest else ""
        lines.append(f"{rates[i]:8.1e}  {losses[i]:8.4f}  {bar}{mark}")
    return lines


def sweep_drawing(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marks: dict[str, float]
) -> Drawing:
    """Plot the losses over the rates, with a labelled vertical line at each rate of ``marks`` (label -> rate)."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(rates, losses, "o", color=COLOURS[6], markersize=3, label="loss of a step")
        axes.plot(rates, smoothed, color=COLOURS[0], label="mean of neighbours")
        for place, (label, rate) in enumerate(marks.items()):
            axes.axvline(rate, color=COLOURS[1 + place], linestyle=("-", "--", ":")[place % 3], label=label)
        axes.set(xscale="log", xlabel="learning rate of the adapter", ylabel="training loss per item")
        tidy(axes)
        axes.legend(frameon=False)

    caption = "One optimizer step at each rate, from low to high; the loss is that of the step's rows, before the step."
    return Drawing(name="lr_sweep", caption=caption, size=(8, 4.2), draw=draw)


def sweep_page(title: str, lines: Sequence[str], drawing: Drawing, command: str) -> str:
    """Build the page of a sweep: the proposed rate, the figure, and the command that made it."""
    return html.page(title, f"mirrortune {__version__}", html.box(lines), html.figure(drawing), html.command(command))
