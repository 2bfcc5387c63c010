# make help lists the targets. Everything is installed into $(VENV), by $(PYTHON), once.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PRESET ?= toyworld

PY := "$(VENV)/bin/python"
NOTEBOOKS := $(wildcard nbs/*.ipynb nbs/*/*.ipynb)
STAMPS := $(VENV)/.installed-notebooks $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lab docs readme clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r a b; do printf '  %-12s %s\n' "$$a" "$$b"; done

demo: $(VENV)/.installed-notebooks  ## pretrain, evaluate, report: [PRESET=smoke] [IMAGES=folder] [SEED=1] [RUN_DIR=folder]
	@$(PY) -m seer_nb.launch nbs/00_quickstart.ipynb -f "nbs/params/quickstart/$(PRESET).yaml" \
	  $(foreach p,IMAGES SEED RUN_DIR,$(if $(filter-out undefined,$(origin $p)),-p $(shell echo $p | tr A-Z a-z) "$$$p"))

test: $(VENV)/.installed-dev  ## run every notebook, then pytest
	OMP_NUM_THREADS=1 "$(VENV)/bin/nbdev_test" --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -rs

lab: $(VENV)/.installed-notebooks  ## open the notebooks in JupyterLab: [ARGS=--no-browser]
	@$(PY) -m jupyter lab --notebook-dir nbs $(ARGS)

docs: _docs/index.html  ## render the site into _docs/

_docs/index.html: $(VENV)/.installed-dev _quarto.yml settings.ini $(NOTEBOOKS) $(wildcard docs/*.py nbs/*.css)
	$(PY) docs/build.py
	@touch $@

readme: README.md  ## write README.md from nbs/index.ipynb

README.md: nbs/index.ipynb docs/readme.py
	$(PYTHON) docs/readme.py

clean:  ## remove what make has made, except the runs
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The environment. A stamp counts only while the environment works and belongs to this very folder.
ifneq ($(shell $(PY) -I -c 'import os, pip, seer_nb; print(os.path.samefile(os.path.dirname(seer_nb.__file__), "seer_nb"))' 2>/dev/null),True)
.PHONY: $(STAMPS)
endif

$(STAMPS): $(VENV)/.installed-%: settings.ini setup.py constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("seer_nb needs Python 3.10 or newer; this is " + sys.version.split()[0] + ": make PYTHON=python3.x …")'
	@[ ! -e "$(VENV)" ] || [ -f "$(VENV)/pyvenv.cfg" ] || { echo "$(VENV) is not a virtual environment: make VENV=… (a new folder)" >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)"
	@echo "installing into $(VENV) (the first time: about 5 GB, most of it PyTorch)"
	$(PY) -m pip install --disable-pip-version-check -e '.[$*]' -c constraints.txt
	@touch $@ $(if $(filter dev,$*),"$(VENV)/.installed-notebooks")
