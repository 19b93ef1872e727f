"""Figures 10 and 11: singular values, and how much of a matrix its top r hold."""

from __future__ import annotations

from typing import Any

from reproduction.lab import Lab
from reproduction.report import NOT_RUN, Report, mean, table
from sigmix.evals.plots import figure, save_png

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75)
"""Top r as shares of all singular values."""

POINTS = 64


class Spectra:
    """Singular values of the base."""

    name, title = "spectra", "Figures 10 and 11: spectra"
    needs: tuple[str, ...] = ()

    def run(self, lab: Lab) -> None:
        """Once; from the decomposition that everything uses."""
        if lab.store.fact("spectra") is None:
            lab.store.write_fact("spectra", lab.timed(lambda: self._measure(lab)))

    @staticmethod
    def _measure(lab: Lab) -> dict[str, Any]:
        from sigmix.engine.execution import adapted_layers

        model, _ = lab.base()
        kinds: dict[str, list[dict[str, Any]]] = {}
        for path, layer in adapted_layers(model).items():
            layer.ensure_factors()
            s = layer.svf_s.double().cpu()
            power = s.square().cumsum(0) / s.square().sum()
            places = [round(i * (len(s) - 1) / (POINTS - 1)) for i in range(POINTS)]
            kinds.setdefault(path.rsplit(".", 1)[-1], []).append(
                {
                    "path": path, "r": len(s), "s": [float(f"{s[i] / s[0]:.4g}") for i in places],
                    "held": [float(f"{power[max(round(share * len(s)) - 1, 0)]:.4g}") for share in SHARES],
                }
            )  # fmt: skip
        return {"kinds": kinds}

    def tables(self, report: Report) -> str:
        """Variance held by the top r, mean over the layers, with the least and the most."""
        found = report.store.fact("spectra")
        if found is None:
            return NOT_RUN
        rows = []
        for kind, matrices in found["kinds"].items():
            columns = list(zip(*(one["held"] for one in matrices), strict=True))
            shown = [f"{100 * mean(c):.0f} ({100 * min(c):.0f} to {100 * max(c):.0f})" for c in columns]
            rows.append([kind, matrices[0]["r"], *shown])
        head = ["matrix", "r", *(f"top {share:.0%}" for share in SHARES)]
        return (
            "Share of the variance Σs² in per cent, mean over the layers (least to most).\n\n" + table(head, rows)
            + "\n\n" + report.image("Singular values", "spectra")
        )  # fmt: skip

    def plots(self, report: Report) -> None:
        """Singular values of every matrix, a panel for each kind."""
        found = report.store.fact("spectra")
        if found is None:
            return
        canvas = figure(10, 4)
        axes = canvas.subplots(2, -(-len(found["kinds"]) // 2), squeeze=False).flatten()
        for panel, (kind, matrices) in zip(axes, found["kinds"].items(), strict=False):
            for number, one in enumerate(matrices):
                xs = [i / (POINTS - 1) for i in range(POINTS)]
                panel.semilogy(
                    xs, one["s"], color=f"{0.8 * (1 - number / max(len(matrices) - 1, 1)):.2f}", linewidth=0.6
                )
            panel.set_title(kind, fontsize=8)
            panel.tick_params(labelsize=6)
        canvas.suptitle("singular values over the largest, by rank as a share; darker is deeper", fontsize=8)
        save_png(canvas, report.picture("spectra"))
