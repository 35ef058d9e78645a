"""Plots of what was observed. They need matplotlib: `pip install 'aqt-engine[report]'`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aqt_engine.analysis.measurement import BINS, HISTOGRAM_REACH
from aqt_engine.analysis.observation import Contraction
from aqt_engine.analysis.sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_HISTOGRAMS = 48
_COLUMNS = 4


def plot_histograms(contractions: Sequence[Contraction], file: Path) -> None:
    """Draws each operand's scaled values and buckets; the worst `MAX_HISTOGRAMS` of many."""
    from matplotlib.figure import Figure

    panels = [
        (contraction, side, operand)
        for contraction in contractions
        for side, operand in contraction.operands.items()
    ]
    panels = sorted(panels, key=lambda p: p[2].sums.sqnr_db)[:MAX_HISTOGRAMS]
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.2 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, _COLUMNS, squeeze=False)
    edges = np.linspace(-HISTOGRAM_REACH, HISTOGRAM_REACH, BINS + 1)
    for axes, (contraction, side, operand) in zip(grid.flat, panels, strict=False):
        _step(axes, edges, operand.sums.before, "before", "tab:blue")
        _step(axes, edges, operand.sums.after, "after", "tab:orange")
        axes.set_yscale("log")
        axes.set_title(
            f"{contraction.path}:{contraction.op} {side}\n{operand.bits} bits, "
            f"{operand.sums.sqnr_db:.1f} dB, {operand.sums.clipped_share:.2%} clipped",
            fontsize=7,
        )
        axes.tick_params(labelsize=6)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle("Values over the bound of their numerics: blue before, orange after")
    figure.savefig(file, dpi=110)


def plot_sensitivity(alone: Sequence[Sensitivity], file: Path) -> None:
    """Draws the model's error for each contraction that is quantized alone, a bar for each bits."""
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(s.place for s in alone))
    widths = sorted({s.bits for s in alone}, reverse=True)
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(places) * len(widths)), layout="constrained")
    axes = figure.subplots()
    for offset, bits in enumerate(widths):
        found = {s.place: s.quality.sqnr_db for s in alone if s.bits == bits}
        centers = np.arange(len(places)) + offset * 0.8 / len(widths)
        heights = [found.get(place, np.nan) for place in places]
        axes.barh(centers, heights, height=0.8 / len(widths), label=f"{bits} bits")
    axes.set_yticks(np.arange(len(places)), [":".join(place) for place in places], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("signal to quantization noise in the model's output, dB: shorter costs more")
    axes.legend()
    figure.savefig(file, dpi=110)


def _step(axes: "Axes", edges: Any, counts: Any, label: str, color: str) -> None:
    axes.stairs(np.asarray(counts), edges, label=label, color=color)
