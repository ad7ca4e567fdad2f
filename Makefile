VENV_PYTHON := .venv/bin/python
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cc' '*.inl')
PYTHON_DIRS := python scripts tests benches

.PHONY: setup demo test parity lint bench format clean

setup:
	@scripts/setup

# The main job: real text in; a trained, distilled and served mixture of experts out. runs/demo/
demo: setup
	@$(VENV_PYTHON) scripts/demo.py

test: setup
	ctest --test-dir build/dev --output-on-failure
	$(VENV_PYTHON) -m pytest

# Our layers and our training engine against DeepSpeed's own, which lives with the other peers of `coterie bench`.
parity: setup
	@benches/peers/setup
	PYTHONPATH=python .venv-peers/bin/python -m pytest tests/test_torch_moe.py tests/test_initialize.py

lint: setup
	@.venv/bin/clang-format --dry-run -Werror $(CPP_FILES)
	@.venv/bin/ruff check $(PYTHON_DIRS)
	@.venv/bin/ruff format --check $(PYTHON_DIRS)
	@$(VENV_PYTHON) scripts/check_layering.py

bench: setup
	@for bench in build/dev/benches/*_bench; do $$bench || exit 1; done

format: setup
	@.venv/bin/clang-format -i $(CPP_FILES)
	@.venv/bin/ruff check --fix $(PYTHON_DIRS)
	@.venv/bin/ruff format $(PYTHON_DIRS)

clean:
	rm -rf build runs data python/coterie/*.so
