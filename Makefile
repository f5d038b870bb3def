# make demo: digits out of noise.  make test, make lint, make soak: for those who change the code.  make bench: what it costs.
# make gpu: all that a card has to show, on one page; make gpu-quick: the same in two minutes anywhere, to see that it runs.
PYTHON ?= python3
BIN = .venv/bin
DEMO = models/demo

.PHONY: demo test lint soak bench gpu gpu-quick

demo: .venv/installed
	$(BIN)/python train.py configs/Digits_class.json $(if $(wildcard $(DEMO)/*),--resume) \
		--set train_cfg.epochs=22 train_cfg.model_save_dirpath=$(DEMO)
	$(BIN)/python test.py $(DEMO)/last.pth -n 80 --pictures 80 --class all --guidance 1.5 --sampler dpm --timesteps 25
	@echo "Look at $(DEMO)/last_gen/grid.png, trajectory.gif and 0.png beside it"

# A process of one thread for each core: networks this small hardly use a second one.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 8 --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

soak: .venv/installed-dev
	$(BIN)/python -m pytest -q -m slow

bench: .venv/installed-bench
	for name in limit peers full_loss scaling; do $(BIN)/python benchmarks/$$name.py || exit; done

gpu: .venv/installed-dev .venv/installed-bench
	$(BIN)/python benchmarks/gpu.py

gpu-quick: .venv/installed-dev
	$(BIN)/python benchmarks/gpu.py --quick

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.venv/installed-bench: requirements-bench.txt .venv/installed
	$(BIN)/pip install -q -r requirements-bench.txt
	touch $@
