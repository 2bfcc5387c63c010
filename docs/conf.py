"""Sphinx settings for the site that docs/build.py renders where Quarto is missing."""
from configparser import ConfigParser
from pathlib import Path

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, version = settings["title"], settings["author"], settings["version"]
copyright = settings["copyright"]
html_title = project
html_theme = "furo"
html_copy_source = html_show_sourcelink = False
html_css_files = ["styles.css"]

extensions = ["myst_nb"]
nb_execution_mode = "off"          # the pages show the outputs stored in the notebooks
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
