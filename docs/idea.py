#!/usr/bin/env python3
"""Draws idea.png: configurations, their distinct blocks, the library, and the models composed of it."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

BLOCKS = 4
CHOICES = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1)]  # a variant for each block, one row a configuration
MIXED = (1, 0, 1, 0)  # a configuration that nobody thought of when the library was made
COLOURS = ("#0072B2", "#E69F00")  # of Okabe and Ito, told apart by most eyes
WIDTH, HEIGHT, GAP = 0.9, 0.36, 0.16


def box(axes, x, y, variant, dashed=False):
    """A block: narrower if more of it is pruned."""
    width = WIDTH * (1, 0.6)[variant]
    axes.add_patch(
        Rectangle(
            (x + (WIDTH - width) / 2, y),
            width,
            HEIGHT,
            facecolor=COLOURS[variant],
            edgecolor="black",
            linewidth=0.8,
            linestyle="--" if dashed else "-",
        )
    )


def stack(axes, x, y, choice, label, dashed=False):
    """A model: its blocks one above the other."""
    for number, variant in enumerate(choice):
        box(axes, x, y + number * (HEIGHT + GAP), variant, dashed)
    axes.text(x + WIDTH / 2, y - 0.28, label, ha="center", va="center", fontsize=8)


def arrow(axes, start, end):
    axes.add_patch(FancyArrowPatch((start, 1.6), (end, 1.6), arrowstyle="-|>", mutation_scale=14, color="0.3"))


def draw(path):
    figure, axes = plt.subplots(figsize=(11, 3.4))
    for number, choice in enumerate(CHOICES):
        stack(axes, number * 1.4, 0.6, choice, f"configuration {number}")
    arrow(axes, 4.0, 4.6)
    for number in range(BLOCKS):
        for variant in sorted({choice[number] for choice in CHOICES}):
            box(axes, 4.75 + variant * 1.1, 0.6 + number * (HEIGHT + GAP), variant)
    count = sum(len({choice[number] for choice in CHOICES}) for number in range(BLOCKS))
    axes.text(
        5.75, 0.32, f"{count} .npy files for {BLOCKS * len(CHOICES)} blocks", ha="center", va="center", fontsize=8
    )
    arrow(axes, 6.95, 7.55)
    for number, choice in enumerate(CHOICES):
        stack(axes, 7.7 + number * 1.15, 0.6, choice, f"model {number}")
    stack(axes, 7.7 + len(CHOICES) * 1.15, 0.6, MIXED, "any other mix", dashed=True)
    titles = {
        1.85: "what is wanted",
        5.75: "the library: each distinct block\npruned and fine-tuned once",
        9.9: "composed",
    }
    for x, title in titles.items():
        axes.text(x, 3.05, title, ha="center", va="center", fontsize=10)
    axes.set_xlim(-0.2, 12.3)
    axes.set_ylim(0.1, 3.4)
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    draw(Path(__file__).with_name("idea.png"))
