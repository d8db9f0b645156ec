"""Draw the routes of the error in BPTT and in SLTT: writes routes.png beside this file."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

STEPS, LAYERS = 4, 3
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"


def panel(axes, title, temporal):
    """One method: a box for each layer and step, and an arrow for each way that a gradient goes."""
    for t in range(STEPS):
        for layer in range(LAYERS):
            place = (t - 0.2, layer - 0.17)
            axes.add_patch(FancyBboxPatch(place, 0.4, 0.34, "round,pad=0.03", fill=False, edgecolor=GREY))
            axes.text(t, layer, f"$t={t + 1}$" if layer == 0 else "", ha="center", va="center", fontsize=8)
            if layer:
                arrow(axes, (t, layer - 0.22), (t, layer - 0.78), BLUE)
            if t and temporal:
                arrow(axes, (t - 0.25, layer), (t - 0.75, layer), ORANGE)
        arrow(axes, (t, LAYERS - 0.35), (t, LAYERS - 0.78), BLUE)
        axes.text(t, LAYERS - 0.2, "loss", ha="center", fontsize=8)
    axes.set_xlim(-0.9, STEPS - 0.4)
    axes.set_ylim(-0.95, LAYERS + 0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    for layer in range(LAYERS):
        axes.text(-0.85, layer, f"layer {layer + 1}", rotation=90, va="center", fontsize=8, color=GREY)


def arrow(axes, start, stop, color):
    """One way of the gradient."""
    axes.add_patch(
        FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.4)
    )


def main():
    """Draw and save."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    panel(left, "BPTT: back through layers and through time", temporal=True)
    panel(right, "SLTT: back through layers; each step by itself", temporal=False)
    left.text(1.5, -0.55, "blue: layer to layer", ha="center", color=BLUE, fontsize=8)
    left.text(1.5, -0.8, "orange: step to step", ha="center", color=ORANGE, fontsize=8)
    right.text(1.5, -0.55, "nothing goes from step to step:", ha="center", color=GREY, fontsize=8)
    right.text(1.5, -0.8, "each step is freed before the next one", ha="center", color=GREY, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
