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
html_css_files, html_js_files = ["styles.css"], ["zoom.js"]

html_favicon = str(Path(__file__).parent.parent / "nbs/favicon.svg")
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#01507e", "color-brand-content": "#0173b2"},
    "dark_css_variables": {"color-brand-primary": "#7cc4ef", "color-brand-content": "#7cc4ef"},
    "footer_icons": [{"name": "GitHub", "url": settings["git_url"], "html": "source", "class": ""}],
}

extensions = ["myst_nb", "sphinx_copybutton", "sphinxext.opengraph"]
ogp_site_url = f"{settings['doc_host']}{settings['doc_baseurl']}/"
ogp_site_name, ogp_image, ogp_image_alt = project, f"{ogp_site_url}_static/social.png", settings["description"]
ogp_social_cards = {"enable": False}                               # one picture for all pages, docs/social.py
ogp_custom_meta_tags = ('<meta name="twitter:card" content="summary_large_image" />',)
nb_execution_mode = "off"          # the pages show the outputs stored in the notebooks
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
nb_code_prompt_show, nb_code_prompt_hide = "imports", "imports"    # the only cells that are folded
html_math_renderer = "mathml"


def setup(app):
    """Write formulas as MathML, which browsers draw without a script or a network."""
    from docutils.nodes import SkipNode
    from latex2mathml.converter import convert

    def draw(display):
        def visit(self, node):
            self.body.append(convert(node.astext(), display=display))
            raise SkipNode
        return visit, None
    app.add_html_math_renderer("mathml", inline_renderers=draw("inline"), block_renderers=draw("block"))
