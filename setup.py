"""Packaging for seer_nb: every value lives in settings.ini; change it there, not here."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def words(key):
    "The whitespace-separated entries of a settings.ini line."
    return cfg.get(key, "").split()


extras = {name: words(f"{name}_requirements") for name in ("notebooks", "datasets", "peers", "tensorboard", "docs", "dev")}
extras["dev"] = sorted(set().union(*extras.values()))   # everything

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    classifiers=["Intended Audience :: Science/Research", "Topic :: Scientific/Engineering :: Artificial Intelligence",
                 *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14))],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["seer_nb", "seer_nb.*"]),
    package_data={"seer_nb": ["**/*.csv"]},
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={"nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
