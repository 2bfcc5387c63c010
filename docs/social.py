"""Draw nbs/social.png, the picture that a link to the site shows elsewhere: python docs/social.py"""
import textwrap
from configparser import ConfigParser
from pathlib import Path

import matplotlib.pyplot as plt

TOP = Path(__file__).resolve().parent.parent


def draw_card(title: str, text: str, picture):
    "Return a figure of 1200 x 630 pixels: a title, a line of text, and a picture below."
    fig = plt.figure(figsize=(12, 6.3), dpi=100)
    fig.text(0.06, 0.86, title, fontsize=44, weight="bold", color="#0173b2", va="center", family="monospace")
    fig.text(0.06, 0.72, textwrap.fill(text, 66), fontsize=21, va="center", linespacing=1.4)
    ax = fig.add_axes([0.02, 0.02, 0.96, 0.58])
    ax.imshow(picture)
    ax.set_axis_off()
    return fig


if __name__ == "__main__":
    settings = ConfigParser(delimiters=["="])
    settings.read(TOP / "settings.ini", encoding="utf-8")
    settings = settings["DEFAULT"]
    draw_card(settings["title"], settings["description"], plt.imread(TOP / "nbs/hero.png")).savefig(TOP / "nbs/social.png")
