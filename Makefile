# make demo       set up, train a small DINO on synthetic shapes, evaluate, write a picture to output/demo
# make test       set up, then the ordinary tests (under 12 minutes on 2 cores)
# make test-slow  the long tests
# make gpu RESULTS=folder STEPS="--only build,kernels"  build, test and measure on a machine with a CUDA GPU;
#                          installs nothing; for STEPS see tools/gpu_suite.py
# make soak       kill trainings at random moments and compare their results with unbroken ones (half an hour)
# make pictures   train a small model and redraw the pictures of docs/how_it_works.md and docs/method.md
# make lint       ruff
# make clean      remove .venv, the compiled operator and caches; keep the results in output/

PYTHON ?= python3
RUN = .venv/bin/python
export PYTHON

.PHONY: demo test test-slow gpu soak pictures lint clean

demo:
	@tools/setup_env.sh demo
	@$(RUN) tools/run_demo.py

test:
	@tools/setup_env.sh test
	$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test-slow:
	@tools/setup_env.sh slow
	$(RUN) -m pytest -m slow

gpu:
	@bash tools/gpu_suite.sh $(or $(RESULTS),output/gpu) $(STEPS)

soak:
	@tools/setup_env.sh test
	$(RUN) benchmarks/soak.py --results $(or $(RESULTS),output/soak)

pictures:
	@tools/setup_env.sh demo
	@$(RUN) tools/draw_pictures.py

lint:
	@tools/setup_env.sh test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	rm -f dino/layers/ops/_deform_attn_* dino/layers/_deform_attn_*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
