# SPDX-License-Identifier: Apache-2.0
"""The angles of an adapter that turns planes, layer by layer."""

from __future__ import annotations

from typing import Any

from mirrortune.reports.drawing import COLOURS, Drawing, tidy

_BINS = 41
_MOST_ROWS = 60


def angle_drawing(angles: dict[str, list[float]]) -> Drawing:
    """Histograms of an adapter's plane angles in degrees: all together, and a row for each layer.

    Args:
        angles: by layer or weight, at least one angle in all.
    """

    def draw(figure: Any) -> None:
        import numpy as np  # noqa: PLC0415

        every = np.concatenate([np.asarray(part) for part in angles.values()])
        largest = float(np.abs(every).max()) or 1.0
        bins = np.linspace(-largest, largest, _BINS + 1)
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        left.hist(every, bins=bins, color=COLOURS[0])
        left.set(xlabel="angle (degrees)", ylabel="planes", title="All layers")
        tidy(left)
        shares = [100 * np.histogram(part, bins)[0] / max(1, len(part)) for part in angles.values()]
        mesh = right.pcolormesh(bins, range(len(angles) + 1), shares, cmap="cividis", edgecolors="face", linewidth=0.3)
        right.invert_yaxis()
        right.set(xlabel="angle (degrees)", title="By layer")
        step = -(-len(angles) // _MOST_ROWS)
        names = [name.removesuffix(".weight") for name in angles]
        right.set_yticks([i + 0.5 for i in range(0, len(names), step)], names[::step], fontsize=6)
        figure.colorbar(mesh, ax=right, label="planes of the layer (%)").outline.set_visible(False)

    return Drawing(
        name="plane_angles",
        caption="Angles by which the adapter turns its planes. An angle is the size of a turn; how much it moves also "
        "depends on the strengths of its two directions.",
        size=(10, max(3.0, 1 + 0.13 * min(len(angles), _MOST_ROWS))),
        draw=draw,
    )
