"""The picture of what a model fills into a caption. Knows numbers and matplotlib, which is loaded when one is drawn."""

import textwrap
from collections.abc import Sequence

import numpy as np


def fills_figure(image: np.ndarray, masked_caption: str, words: Sequence[str], fills: Sequence[Sequence[tuple]]):
    """A matplotlib figure: the picture, its masked caption, and bars of the model's fills of each hidden word (at most
    three); a fill that is the hidden word is green."""
    from matplotlib.figure import Figure

    shown = min(len(words), 3)
    figure = Figure(figsize=(4 + 2.6 * max(shown, 1), 3.6), dpi=100, layout="constrained")
    axes = figure.subplots(1, 1 + shown, width_ratios=[1.4] + [1.0] * shown, squeeze=False)[0]
    axes[0].imshow(image)
    axes[0].set_axis_off()
    figure.suptitle("\n".join(textwrap.wrap(masked_caption, 70)), fontsize=11)
    for axis, word, best in zip(axes[1:], words, fills):
        names = [name for name, _ in best][::-1]
        colours = ["#2a9d5c" if name == word else "#9aa5b1" for name in names]
        axis.barh(range(len(names)), [p for _, p in best][::-1], color=colours)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlim(0, 1)
        axis.set_title(f"hidden: {word}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
