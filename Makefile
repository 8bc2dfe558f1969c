# The two commands a newcomer needs, and a few for those who stay. docs/HACKING.md says more.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help deps build cuda demo serve test fuzz lint format docker-check gpu-bundle clean

JOBS ?= $(shell nproc)
BUILD := build/release
MOED := $(BUILD)/server/moed
# Which of the two binaries make serve runs.
SERVED := $(BUILD)/served
DEMO := models/demo
MODEL ?= $(DEMO)
ARGS ?=
# What make fuzz gives each target.
SECONDS ?= 600
# Compute capabilities that make cuda and make serve build for ("86;90"), or all; empty: those of the GPUs here, else 80.
ARCHS ?=
# 1: `make test` ends with what `make cuda` does.
CUDA ?= 0

help:
	@echo 'moed: serves mixture-of-experts language models'
	@echo
	@echo '  make serve                 install what is missing, build, make the demo model, serve it on 127.0.0.1:8000'
	@echo '  make serve MODEL=/path     serve a checkpoint folder of yours;  ARGS="--http-port 9000 ..." passes flags on'
	@echo '  make test                  install, build and run every test; ends with "N passed, N failed"'
	@echo
	@echo '  make build                 build the daemon only'
	@echo '  make cuda [ARCHS=all]      build it with the device cuda: build/release/cuda/moed (no GPU is needed to build)'
	@echo '  make gpu-bundle            write build/moed-gpu.tar.gz: what tools/gpu_check.sh measures on a machine with a GPU'
	@echo '  make fuzz SECONDS=600      hostile files and bodies by libFuzzer, each target for so long'
	@echo '  make lint                  formatting, layering, clang-tidy, thread-safety analysis'
	@echo '  make format                let clang-format rewrite the C++ sources'
	@echo '  make docker-check          build the container image and chat with the daemon in it (root)'
	@echo '  make clean                 remove build/ (not models/, not .venv/)'

deps:
	@tools/install_deps.sh serve

# CMake notices changed lists by itself; a changed preset is for make to notice.
$(BUILD)/build.ninja: CMakePresets.json | deps
	@cmake --preset release --log-level=WARNING
	@touch $@

build: deps $(BUILD)/build.ninja
	@cmake --build $(BUILD) --target moed -j $(JOBS)

demo: deps
	@.venv/bin/python tools/make_demo.py --out $(DEMO)

# nvcc's 420 MB are worth their download where there is a driver.
cuda: deps
	@ARCHS='$(ARCHS)' JOBS=$(JOBS) tools/build_cuda.sh

gpu-bundle:
	@tools/gpu_bundle.sh

# With a GPU that it knows, by the build that has the device cuda, which device.device = "auto" then takes; what keeps
# that from being built is said, and the CPU serves.
serve: deps
	@if [ '$(MODEL)' = '$(DEMO)' ]; then .venv/bin/python tools/make_demo.py --out $(DEMO); fi
	@mkdir -p $(BUILD) && echo '$(MOED)' >$(SERVED); \
	  if ! said=$$(tools/gpu_here.sh); then echo "serve: $$said, so the CPU serves"; \
	  elif ARCHS='$(ARCHS)' JOBS=$(JOBS) tools/build_cuda.sh --build-only; then echo '$(BUILD)/cuda/moed' >$(SERVED); \
	  else echo 'serve: the device cuda was not built, so the CPU serves'; fi
	@grep -qx '$(BUILD)/cuda/moed' $(SERVED) || $(MAKE) --no-print-directory build
	@if [ '$(MODEL)' = '$(DEMO)' ]; then export MOED_KV_GIB="$${MOED_KV_GIB:-1}"; fi; \
	  exec "$$(cat $(SERVED))" serve --model '$(MODEL)' $(ARGS)

test:
	@JOBS=$(JOBS) CUDA=$(CUDA) tools/run_tests.sh

fuzz:
	@tools/install_deps.sh test
	@JOBS=$(JOBS) tools/fuzz.sh $(SECONDS)

# The generated headers must be there before clang reads a unit, and the simplest way to have them all is to build.
lint:
	@tools/install_deps.sh test
	@cmake --preset release --log-level=WARNING
	@cmake --build $(BUILD) -j $(JOBS)
	@JOBS=$(JOBS) tools/lint.sh

format:
	@git -c safe.directory='*' ls-files -co --exclude-standard '*.h' '*.cpp' | xargs clang-format-16 -i

docker-check:
	@tools/install_deps.sh docker
	@tools/docker_check.sh

clean:
	rm -rf build
