"""What `aqt report` found, as tables, as JSON and as a page with plots."""

import base64
import dataclasses
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aqt_engine.analysis import Contraction, Mixture, Quality, Sensitivity
from aqt_engine.analysis.observation import Operand


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The contractions of a model, what each costs alone, and a mixture if one was searched."""

    contractions: Sequence[Contraction]
    alone: Sequence[Sensitivity]
    in_float: Quality
    as_it_is: Quality
    mixture: Mixture | None

    def tables(self) -> list[Table]:
        """One table of contractions, one of sensitivities, one of the mixture."""
        tables = [self._contractions(), self._sensitivities()]
        return tables if self.mixture is None else [*tables, self._mixed(self.mixture)]

    def document(self) -> dict[str, Any]:
        """Everything, histograms too, as JSON has it; what is infinite or NaN is null."""
        return {
            "contractions": [_contraction(c) for c in self.contractions],
            "sensitivity": [
                {"path": s.place[0], "op": s.place[1], "bits": s.bits} | _quality(s.quality)
                for s in self.alone
            ],
            "float": _quality(self.in_float),
            "model": _quality(self.as_it_is),
            "mixture": None if self.mixture is None else _mixture(self.mixture),
        }

    def _contractions(self) -> Table:
        table = Table(title="Contractions", title_justify="left")
        table.add_column("path", overflow="fold")
        table.add_column("op")
        for column in ("SQNR dB", "side", "bits", "SQNR dB", "clipped", "weight bytes"):
            table.add_column(column, justify="right")
        for c in self.contractions:
            for position, (side, operand) in enumerate(c.operands.items()):
                first = (c.path, c.op, _decibels(c.sqnr_db)) if position == 0 else ("", "", "")
                table.add_row(
                    *first,
                    side,
                    str(operand.bits),
                    _decibels(operand.sums.sqnr_db),
                    f"{operand.sums.clipped_share:.3%}",
                    f"{operand.nbytes:,}" if operand.is_weight else "",
                )
        return table

    def _sensitivities(self) -> Table:
        title = "Quantized alone, worst first: what the model's output then is"
        table = Table(title=title, title_justify="left")
        table.add_column("path", overflow="fold")
        for column in ("op", "bits", "SQNR dB", "score"):
            table.add_column(column, justify="right")
        table.add_row("all in float", "", "", "", _score(self.in_float), style="dim")
        model = _decibels(self.as_it_is.sqnr_db)
        table.add_row("the model as it is", "", "", model, _score(self.as_it_is), style="dim")
        for s in sorted(self.alone, key=_harm):
            path, op = s.place
            quality = s.quality
            row = (path, op, str(s.bits), _decibels(quality.sqnr_db), _score(quality))
            table.add_row(*row)
        return table

    def _mixed(self, mixture: Mixture) -> Table:
        quality = mixture.quality
        title = f"Mixed precision: {mixture.nbytes:,} bytes, {_decibels(quality.sqnr_db)} dB"
        title += "" if quality.score is None else f", score {_score(quality)}"
        table = Table("path", "op", "bits", title=title, title_justify="left")
        for (path, op), bits in mixture.bits.items():
            table.add_row(path, op, str(bits))
        return table


def write_page(found: Findings, directory: Path) -> None:
    """Writes `report.html`, with its plots in it, and the plots as PNG files beside it."""
    from aqt_engine.analysis.plots import plot_histograms, plot_sensitivity

    directory.mkdir(parents=True, exist_ok=True)
    plot_sensitivity(found.alone, directory / "sensitivity.png")
    plot_histograms(found.contractions, directory / "histograms.png")
    console = Console(record=True, width=120, file=io.StringIO())
    for table in found.tables():
        console.print(table)
    page = console.export_html()
    images = "".join(
        f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" style="max-width:100%" '
        f'src="data:image/png;base64,{base64.b64encode((directory / name).read_bytes()).decode()}">'
        for title, name in (("Sensitivity", "sensitivity.png"), ("Histograms", "histograms.png"))
    )
    (directory / "report.html").write_text(page.replace("</body>", f"{images}</body>"))


def _harm(sensitivity: Sensitivity) -> tuple[int, float, float]:
    quality = sensitivity.quality
    return sensitivity.bits, math.inf if quality.score is None else quality.score, quality.sqnr_db


def _contraction(c: Contraction) -> dict[str, Any]:
    return {
        "path": c.path,
        "op": c.op,
        "sqnr_db": _number(c.sqnr_db),
        "macs": c.macs,
        "calls": c.calls,
        "operands": {side: _operand(operand) for side, operand in c.operands.items()},
    }


def _operand(operand: Operand) -> dict[str, Any]:
    sums = operand.sums
    return {
        "shape": list(operand.shape),
        "bits": operand.bits,
        "is_weight": operand.is_weight,
        "bytes": operand.nbytes,
        "sqnr_db": _number(sums.sqnr_db),
        "clipped": sums.clipped_share,
        "histogram_before": [int(n) for n in sums.before],
        "histogram_after": [int(n) for n in sums.after],
    }


def _mixture(mixture: Mixture) -> dict[str, Any]:
    bits = [{"path": p, "op": op, "bits": width} for (p, op), width in mixture.bits.items()]
    return {"bits": bits, "bytes": mixture.nbytes} | _quality(mixture.quality)


def _quality(quality: Quality) -> dict[str, Any]:
    return {"sqnr_db": _number(quality.sqnr_db), "score": quality.score}


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _decibels(x: float) -> str:
    return "exact" if x == math.inf else f"{x:.1f}"


def _score(quality: Quality) -> str:
    return "" if quality.score is None else f"{quality.score:.4f}"
