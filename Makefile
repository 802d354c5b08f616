# medgen's few commands. Each does its own set-up: on a fresh machine `make demo` or `make test` is all you type.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.medgen-ready
OUT    ?= out/demo

# Everything after set-up is local: no hub is asked. Each of pytest's processes gets its share of the cores.
WORKERS ?= 2
ENV = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
TEST_ENV = $(ENV) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup demo test browsers weights figures lint format clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

# uv lives inside .venv, so nothing outside this folder is changed. The stamp makes a second run start at once.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "medgen needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Say: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || { $(BIN)/python -m ensurepip >/dev/null; $(BIN)/python -m pip install -q uv; }
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[digital,xformers,study,privacy,dev]'
	@touch $@

setup: $(READY)  ## create .venv with the tested versions

demo: $(READY)  ## films, training, resume, hearts from ECGs, next visits, measured; ends with the path of one HTML page
	@$(ENV) $(BIN)/medgen demo --out $(OUT)

test: lint  ## every check: ruff, mypy, import-linter, pytest
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations=15

browsers: $(READY)  ## the reading page in Firefox and WebKit, where Debian's packages of both are installed
	$(TEST_ENV) $(BIN)/pytest -m browsers --durations=2

# The shipped weights, from nothing: eight hours on two cores. Interrupted, the same command continues.
weights: $(READY)  ## make the digital patients, train and place everything in medgen/pretrained
	$(BIN)/medgen digital chest --n 6000 --seed 0 --out data/digital_chest
	$(BIN)/medgen digital chest --n 3000 --seed 7001 --out data/digital_chest_judge
	$(BIN)/medgen digital chest --n 4600 --seed 7001 --focus nodule --focus-n 600 --out data/digital_chest_judge_nodules
	$(BIN)/medgen train autoencoder --config configs/autoencoder/digital_chest.yaml
	$(BIN)/medgen train text-encoder --config configs/text_encoder/digital_chest.yaml
	$(BIN)/medgen train text-to-cxr --config configs/text_to_cxr/digital_chest.yaml
	$(BIN)/medgen digital chest --n 6000 --seed 0 --focus nodule --focus-n 1200 --out data/digital_chest_nodules
	$(BIN)/medgen train text-to-cxr --config configs/text_to_cxr/digital_chest_nodules.yaml
	$(BIN)/medgen train classifier --config configs/classifier/digital_chest.yaml
	$(BIN)/medgen train classifier --config configs/classifier/digital_chest_nodules.yaml
	$(BIN)/medgen train re-identification --config configs/re_identification/digital_chest.yaml
	mkdir -p medgen/pretrained
	cp -rT runs/re_identification/digital_chest/export medgen/pretrained/digital_chest_reid
	cp -rT runs/text_to_cxr/digital_chest_nodules/export medgen/pretrained/digital_chest
	cp -rT runs/classifier/digital_chest_nodules/export medgen/pretrained/digital_chest_judge
	$(BIN)/medgen digital echo --n 1200 --seed 0 --out data/digital_echo
	$(BIN)/medgen digital echo --n 600 --seed 7002 --out data/digital_echo_judge
	$(BIN)/medgen train autoencoder --config configs/autoencoder/digital_echo.yaml
	$(BIN)/medgen train ecg-to-echo --config configs/ecg_to_echo/digital_echo.yaml
	$(BIN)/medgen train segmenter --config configs/segmenter/digital_echo.yaml
	cp -rT runs/ecg_to_echo/digital_echo/export medgen/pretrained/digital_echo
	cp -rT runs/segmenter/digital_echo/export medgen/pretrained/digital_echo_judge
	$(BIN)/medgen digital ecg --n 1860 --seed 0 --seconds 6 --rate 250 --out data/digital_ecg
	$(BIN)/medgen train ecg-translation --config configs/ecg_translation/missing_leads.yaml
	cp -rT runs/ecg_translation/missing_leads/export medgen/pretrained/digital_ecg_leads
	$(BIN)/medgen digital progression --n 1200 --seed 0 --out data/digital_progression
	$(BIN)/medgen digital progression --n 300 --seed 7003 --out data/digital_progression_judge
	$(BIN)/medgen train film-meter --config configs/film_meter/digital_progression.yaml
	$(BIN)/medgen train progression --config configs/progression/digital_progression.yaml
	cp -rT runs/film_meter/digital_progression/export medgen/pretrained/digital_progression_judge
	cp -rT runs/progression/digital_progression/export medgen/pretrained/digital_progression

# Every figure of docs/measured.md, from the shipped weights: about five hours on two cores (two of them train the regressor to compare with).
FIGURES := out/figures
figures: $(READY)  ## measure the shipped weights on held-out digital patients
	test -f data/digital_chest/manifest.parquet || $(BIN)/medgen digital chest --n 6000 --seed 0 --out data/digital_chest
	test -f data/digital_chest_nodules/manifest.parquet || $(BIN)/medgen digital chest --n 6000 --seed 0 --focus nodule --focus-n 1200 \
	  --out data/digital_chest_nodules
	$(BIN)/medgen evaluate cases --reference data/digital_chest/manifest.parquet --out $(FIGURES)/cases.jsonl
	$(BIN)/medgen sample text-to-cxr --pipeline digital_chest --cases $(FIGURES)/cases.jsonl --out $(FIGURES)/generated
	$(BIN)/medgen evaluate text-to-cxr --generated $(FIGURES)/generated --reference data/digital_chest/manifest.parquet \
	  --train data/digital_chest_nodules/manifest.parquet --out $(FIGURES)/text_to_cxr
	$(BIN)/medgen evaluate autoencoder --autoencoder medgen/pretrained/digital_chest/vae \
	  --reference data/digital_chest/manifest.parquet --out $(FIGURES)/autoencoder
	test -f data/digital_echo/manifest.parquet || $(BIN)/medgen digital echo --n 1200 --seed 0 --out data/digital_echo
	$(BIN)/medgen evaluate echo-cases --reference data/digital_echo/manifest.parquet --out $(FIGURES)/echo_cases/cases.jsonl
	$(BIN)/medgen sample ecg-to-echo --pipeline digital_echo --cases $(FIGURES)/echo_cases/cases.jsonl --out $(FIGURES)/clips
	$(BIN)/medgen evaluate ecg-to-echo --generated $(FIGURES)/clips --reference data/digital_echo/manifest.parquet --out $(FIGURES)/ecg_to_echo
	test -f data/digital_progression/manifest.parquet || $(BIN)/medgen digital progression --n 1200 --seed 0 --out data/digital_progression
	$(BIN)/medgen evaluate progression-cases --reference data/digital_progression/manifest.parquet --out $(FIGURES)/progression_cases
	$(BIN)/medgen sample progression --pipeline digital_progression --cases $(FIGURES)/progression_cases/cases.jsonl --judge digital_progression_judge \
	  --out $(FIGURES)/futures
	$(BIN)/medgen train progression --config configs/progression/digital_progression.yaml deterministic=true train.out=runs/progression/regressor
	$(BIN)/medgen sample progression --pipeline runs/progression/regressor/export --cases $(FIGURES)/progression_cases/cases.jsonl --out $(FIGURES)/regressed
	$(BIN)/medgen evaluate progression --generated $(FIGURES)/futures --regressor $(FIGURES)/regressed --pipeline digital_progression \
	  --reference data/digital_progression/manifest.parquet --out $(FIGURES)/progression
	$(BIN)/medgen study sample --protocol configs/study/digital_chest.yaml --out $(FIGURES)/study/samples
	test -d $(FIGURES)/study/pack || $(BIN)/medgen study build --protocol configs/study/digital_chest.yaml \
	  --generated $(FIGURES)/study/samples --reference $(FIGURES)/study/samples/reference --out $(FIGURES)/study/pack
	test -f data/digital_chest_b/manifest.parquet || $(BIN)/medgen digital chest --n 800 --seed 7030 --site B --out data/digital_chest_b
	test -f $(FIGURES)/plan/cases.jsonl || $(BIN)/medgen augment plan --manifest data/digital_chest/manifest.parquet --n 1500 --out $(FIGURES)/plan \
	  --heldout data/digital_chest_b/manifest.parquet
	$(BIN)/medgen audit gate --train data/digital_chest/manifest.parquet --heldout data/digital_chest/manifest.parquet --out $(FIGURES)/gate
	$(BIN)/medgen augment generate --plan $(FIGURES)/plan --pipeline digital_chest --quality shipped --privacy $(FIGURES)/gate --steps 12 \
	  --out data/digital_chest_synthetic
	$(BIN)/medgen augment train --config configs/augmentation/digital_chest.yaml
	$(BIN)/medgen augment report --runs runs/augmentation/digital_chest --out $(FIGURES)/augmentation
	$(BIN)/medgen augment train --config configs/augmentation/digital_chest_rare.yaml "arms={real: [1.0], mixed-all: [1.0]}"
	$(BIN)/medgen augment report --runs runs/augmentation/digital_chest_rare --fraction 1.0 --out $(FIGURES)/augmentation_rare
	$(BIN)/medgen audit --pipeline digital_chest --train data/digital_chest/manifest.parquet --heldout data/digital_chest/manifest.parquet \
	  --sections mixed --patients 110 --captions 4 --n 20 --films 40 --path-steps 5 --out $(FIGURES)/audit
	test -f data/leaky/manifest.parquet || $(BIN)/medgen audit leaky-patients --out data/leaky
	$(BIN)/medgen train text-to-cxr --config configs/text_to_cxr/leaky.yaml
	$(BIN)/medgen audit --pipeline runs/text_to_cxr/leaky/export --train data/leaky/manifest.parquet --heldout data/leaky/manifest.parquet \
	  --reference digital_chest --patients 24 --captions 6 --n 20 --films 48 --out $(FIGURES)/audit_leaky
	test -f data/leaky_b/manifest.parquet || $(BIN)/medgen audit leaky-patients --out data/leaky_b --site B --patients 72 --validation 48
	$(BIN)/medgen memcontrol search --config configs/memcontrol/leaky.yaml
	$(BIN)/medgen bench generators --out $(FIGURES)/bench_generators.json
	$(BIN)/medgen bench train --out $(FIGURES)/bench_train.json
	$(BIN)/medgen bench load --out $(FIGURES)/bench_load.json
	$(BIN)/medgen bench sample --out $(FIGURES)/bench_sample.json

lint: $(READY)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and outputs
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
