# Two commands for a fresh clone: `make train` and `make test`. ARGS="..." is passed on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test lint types docs golden mutants peers ray kernels-matrix kernel-hub wheels tiny-assets gpu-carry gpu-rehearsal clean

# Without ARGS the independent judge then looks at what was trained, on prompts of no training, and its verdict goes into
# runs/tiny/report.html as well.
train: $(VENV)/.train
	@$(BIN)/python -m advgrpo.train --fast $(ARGS)
ifeq ($(strip $(ARGS)),)
	@$(BIN)/python -m advgrpo.frontier --loras runs/tiny/lora --output runs/tiny/frontier
	@$(BIN)/python -m advgrpo.report runs/tiny
endif

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation as a site in site/; a broken link, anchor or reference is an error. The variables silence notices on
# the future of mkdocs, whose version pyproject.toml bounds. No --quiet: it silences --strict as well.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict $(ARGS)

# What pyproject.toml lists under [tool.ty.src], and tests/typing, which is only read by the checker.
types: $(VENV)/.dev
	$(BIN)/ty check --python $(VENV) $(ARGS)

# Record the numbers of tests/golden/losses anew, after a change that is meant to change them.
golden: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden_runs $(ARGS)

# Plant every bug of tests/mutants in a copy of the tree and see its tests go red: those whose patch, tests or files have
# changed since tests/mutants/results.json. ARGS="--all -j 4" plants all of them, four at a time.
mutants: $(VENV)/.dev
	@$(BIN)/python -m tests.mutants.run $(ARGS)

# tests/kernels at the lower end of what kernels/pyproject.toml allows and between the ends; `make test` is the upper.
# Gigabytes: torch's wheels for Linux bring CUDA. MATRIX=LANE runs another lane.
MATRIX ?= $(PYTHON):2.6.0:3.2.0:diffusers==0.33.1,transformers==4.46.3,peft==0.14.0 \
  python3.12:2.11.0:3.6.0:diffusers,transformers,peft

kernels-matrix:
	tests/kernels/matrix.sh $(MATRIX)

# Both wheels into dist/, each installed and used in an environment of its own.
wheels:
	PYTHON=$(PYTHON) tests/wheels.sh

# The kernels as a repository of the Hugging Face kernel hub, and that repository's own tests, on the PyTorch references
# and in Triton's interpreter. Their client, the package `kernels`, stays out of $(VENV): transformers and diffusers look
# for it and change with what they find.
HUB_REPO ?= local/advgrpo-kernels
HUB_CLIENT ?= kernels>=0.17,<0.19
hub-test = cd .hub/advgrpo-kernels && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.hub/client \
  LOCAL_KERNELS=$(HUB_REPO)=$(CURDIR)/.hub/advgrpo-kernels/build $(1) $(abspath $(BIN))/python -m pytest -q tests

kernel-hub: $(VENV)/.dev
	rm -rf .hub/advgrpo-kernels
	$(BIN)/python -m tools.kernel_hub .hub/advgrpo-kernels --repo-id $(HUB_REPO)
	@$(call install,--no-deps --upgrade --target .hub/client "$(HUB_CLIENT)")
	$(call hub-test,)
	$(call hub-test,TRITON_INTERPRET=1 ADVGRPO_KERNELS_BACKEND=triton)

# The integrations of kernels/ against the other codebases themselves, cloned at the commits of tests/peers/commits.json.
peers: $(VENV)/.dev
	$(BIN)/python -m tests.peers.checkouts .peers
	ADVGRPO_PEERS=$(CURDIR)/.peers OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/peers $(ARGS)

# Rewards' workers on a Ray cluster of this machine: the extra `ray`, some 200 MB, stays out of what `make test` installs,
# which then runs this as well.
ray: $(VENV)/.dev
	@$(call install,--editable ".[dev,ray]")
	ADVGRPO_RAY=required OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/rewards/test_pool.py -k ray $(ARGS)

# Build what advgrpo/tiny/assets ships anew, some four hours of one CPU core; what then differs from what is shipped is at
# the end of docs/tiny.md. The artists' files come from npm.
ASSETS := advgrpo/tiny/assets

tiny-assets: $(VENV)/.dev
	$(BIN)/python -m tools.tiny.draw_sheets --output $(ASSETS)/drawings
	$(BIN)/python -m tools.tiny.build_references --output $(ASSETS)
	$(BIN)/python -m tools.tiny.build_styles --output $(ASSETS)/styles --sheets $(ASSETS)/drawings
	$(BIN)/python -m tools.tiny.build_pipeline --output build/tiny/vae
	$(BIN)/python -m tools.tiny.build_pipeline --continue-from build/tiny/vae --steps 9000 --output build/tiny/drawings
	$(BIN)/python -m tools.tiny.build_pipeline --continue-from build/tiny/drawings --steps 3000 --good-share 0.6 \
	  --watermarks 0.8 --output $(ASSETS)/pipeline
	$(BIN)/python -m tools.tiny.build_backbone --pipeline $(ASSETS)/pipeline --output $(ASSETS)/backbone
	$(BIN)/python -m tools.tiny.build_preference --pipeline $(ASSETS)/pipeline --output $(ASSETS)/preference
	$(BIN)/python -m tools.tiny.build_second_judge --pipeline $(ASSETS)/pipeline --output $(ASSETS)/second_judge
	$(BIN)/python -m tools.tiny.measure_world --pipeline $(ASSETS)/pipeline --output $(ASSETS)
	$(BIN)/python -m advgrpo.tiny.words --size 32 --per-prompt 4 --output $(ASSETS)/words
	$(BIN)/python -m tools.tiny.build_words --output $(ASSETS)/words/pipeline

# A GPU machine's Python packages without a GPU; 5 GB, because torch's wheels for Linux bring CUDA. GPU_PYTHON=PROGRAM is
# a CPython 3.12. What bench/gpu_wheels.txt names is not there, so it must not be here.
GPU_PYTHON ?= python3.12
GPU_ENV := .rehearsal/bin/python

.rehearsal/.installed: bench/gpu_image.txt bench/gpu_wheels.txt
	rm -rf .rehearsal
	$(GPU_PYTHON) -m venv .rehearsal
	$(GPU_ENV) -m pip install --quiet --requirement bench/gpu_image.txt
	$(GPU_ENV) -m pip uninstall --quiet --yes $$(sed -n 's/==.*//p' bench/gpu_wheels.txt)
	touch $@

# What bench/gpu_session.py needs on a machine without a network, into .whl/: wheels for CPython 3.12 on x86-64 Linux, and
# our kernels compiled for sm_90 by that machine's Triton.
gpu-carry: $(VENV)/.pip .rehearsal/.installed
	rm -rf .whl
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --dest .whl --requirement bench/gpu_wheels.txt
	$(GPU_ENV) -m pip install --quiet --no-index --no-deps --upgrade --target .rehearsal/carried .whl/*.whl
	PYTHONPATH=.:kernels:.rehearsal/carried $(GPU_ENV) -m bench.warm_cache --out .whl/triton-cache.tar.gz
	PYTHONPATH=.:kernels:.rehearsal/carried $(GPU_ENV) -m bench.warm_cache --check .whl/triton-cache.tar.gz
	git describe --always --dirty >.whl/commit
	du -sh .whl

# Every part of the session at small size, as on that machine and under its limits. ARGS="--command 'smoke step'": one.
gpu-rehearsal: $(VENV)/.dev gpu-carry
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.rehearsal --python $(GPU_ENV) $(ARGS)

# What an installation prints is kept beside it and shown only when it fails. INSTALLER="..." does it in pip's place, in
# an environment that has pip.
LOG := $(VENV)/install.log
INSTALLER := $(BIN)/python -m pip install
install = $(INSTALLER) $(1) >$(LOG) 2>&1 || { cat $(LOG); exit 1; }

$(VENV)/.pip:
	@$(PYTHON) -m venv $(VENV)
	@$(call install,--upgrade pip)
	@touch $@

$(VENV)/.train: $(VENV)/.pip pyproject.toml
	@echo "installing into $(VENV), a few minutes the first time"
	@$(call install,--editable ".[train]")
	@touch $@

$(VENV)/.dev: $(VENV)/.pip pyproject.toml
	@echo "installing into $(VENV), a few minutes the first time"
	@$(call install,--editable ".[dev]")
	@touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) .matrix .hub .rehearsal .whl build site *.egg-info
