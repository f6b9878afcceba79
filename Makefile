# make demo: from nothing to a trained network, its masks and pictures.   make test: every fast test.
# make test-slow: interrupted runs, damaged files, arbitrary settings, torch.compile.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

demo: $(VENV)/installed
	$(BIN)/python main.py --training --dataset phantom --name demo --overwrite
	$(BIN)/python main.py --testing --name demo
	@echo
	@echo "masks:    $(CURDIR)/results/demo/masks"
	@echo "pictures: $(CURDIR)/results/demo/panels (image x, mask y, and what the networks make of them)"
	@echo "curves:   $(BIN)/tensorboard --logdir checkpoints"

test: $(VENV)/installed-tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/installed-tests
	$(BIN)/python -m pytest -m slow -s

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) results data/cache .pytest_cache .ruff_cache

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-tests: tests/requirements.txt tools/requirements.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@
