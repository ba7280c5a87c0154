# Every target is a line or two of cargo. `make demo` and `make test` need Rust and a C compiler, nothing else.
TARGET := $(or $(CARGO_TARGET_DIR),target)
HEAVY  := -p deepgen-model -p deepgen-worker

.PHONY: demo test test-light test-heavy test-true-size test-exports parity parity-wgpu test-e2e soak ci fmt lint lint-cloud build base small sweep plan-paper bench-model bench-train bench-memory schema fuzz-spec bench-orchestrator bench-data fuzz

demo: build            ## builds and runs the main job: pipelines/full.toml in the shapes world
	$(TARGET)/release/deepgen run pipelines/full.toml

test: test-light test-heavy test-e2e   ## every test

build:
	cargo build --release --locked -p deepgen -p deepgen-worker

test-light:            ## the orchestrator and the light crates, seconds
	cargo test --locked

test-heavy:            ## model and worker, against reference tensors
	cargo test --release --locked $(HEAVY)

test-true-size:        ## the 5B model made, saved, loaded and run once: 14 GB of disk, minutes
	cargo test --release --locked $(HEAVY) --test true_size -- --ignored --nocapture

test-exports:          ## the Python libraries load what we export (DEEPGEN_PYTHON=... has torch, transformers, diffusers, peft)
	cargo test --release --locked $(HEAVY) foreign -- --ignored --nocapture

parity: build          ## every number of the reference implementations against ours, tensor by tensor
	$(TARGET)/release/deepgen-worker parity tests/fixtures/parity

parity-wgpu:           ## the same on Vulkan: a GPU, or Mesa's software driver where there is none (tens of minutes to build)
	cargo build --release --locked -p deepgen -p deepgen-worker --features deepgen-worker/wgpu
	$(TARGET)/release/deepgen-worker parity tests/fixtures/parity --device wgpu

test-e2e: build        ## a short pipeline with the real worker, undisturbed and killed: same bits
	DEEPGEN_E2E_BIN=$(abspath $(TARGET))/release cargo test --locked --test e2e --test tools --test inspect -- --ignored --test-threads=1 --nocapture

soak:                  ## 200 random kills -9 of orchestrator and workers (minutes); DEEPGEN_SOAK_SEED picks others
	cargo test --locked --test storm -- --ignored --nocapture

ci: fmt lint test      ## what .ci/run runs

fmt:
	cargo fmt --all -- --check

lint:
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --release --locked $(HEAVY) --all-targets -- -D warnings

lint-cloud:            ## the object stores, which few builds have: several minutes for their dependencies
	cargo clippy --locked -p deepgen-data --features cloud --all-targets -- -D warnings

base: build            ## makes the base weights of the shapes world anew (about 10 minutes on 2 cores)
	$(TARGET)/release/deepgen run pipelines/base.toml

small: build           ## the profile that shows the trends (docs/results.md)
	$(TARGET)/release/deepgen run pipelines/full.toml --profile small

sweep: build           ## the architecture ablations
	$(TARGET)/release/deepgen sweep experiments/architecture.toml

plan-paper: build      ## the paper's recipe: sizes, updates, what is missing
	$(TARGET)/release/deepgen plan pipelines/full.toml --profile paper

PYTHON ?= python3
bench-model:           ## every part and whole models beside PyTorch (PYTHON=... with torch), as ratios
	cargo build --release --locked $(HEAVY) --example bench_model
	$(TARGET)/release/examples/bench_model --python $(PYTHON)

bench-train: build     ## training steps of the DiT beside diffusers' transformer (PYTHON=... with it), and what a step waits for
	cargo build --release --locked $(HEAVY) --example bench_model
	$(TARGET)/release/examples/bench_model --python $(PYTHON) --modules diffusers --only DiT
	python3 benches/train/stalls.py $(TARGET)/release/deepgen

bench-memory:          ## peak memory of a training step with and without activation checkpointing
	cargo run --release --locked -p deepgen-model --example peak_memory -- off
	cargo run --release --locked -p deepgen-model --example peak_memory -- on

schema:                ## writes docs/schema/ from the types
	DEEPGEN_UPDATE_SCHEMA=1 cargo test --locked -p deepgen --lib the_copies_in_git

fuzz-spec:             ## ten minutes of mutated pipeline, stage and experiment files (DEEPGEN_FUZZ_SECONDS)
	cargo test --locked -p deepgen --test fuzz_spec -- --ignored --nocapture

N     ?= 100,1000,10000
REPS  ?= 1
TOOLS ?= deepgen,make,ninja,snakemake,dvc
bench-orchestrator:    ## a no-op DAG of 100, 1,000, 10,000 nodes: deepgen beside make, ninja and what else is installed
	cargo build --release --locked -p deepgen $(if $(findstring floor,$(TOOLS)),--example floor --bins)
	python3 benches/orchestrator/bench.py --n $(N) --reps $(REPS) --tools $(TOOLS) --work $(TARGET)/bench-orchestrator \
		--bin deepgen=$(abspath $(TARGET))/release --bin floor=$(abspath $(TARGET))/release/examples $(BENCH)

bench-data:            ## images a second of one core: our loader beside webdataset and Pillow (PYTHON=... has them)
	cargo build --release --locked -p deepgen-data --example load_rate
	$(or $(PYTHON),python3) benches/data/load_rate.py $(TARGET)/release/examples/load_rate

fuzz:                  ## damaged tar shards, records, images, weight files: FUZZ_SECONDS each, 60 by default
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) cargo test --locked -p deepgen-data --test fuzz -- --ignored --nocapture --test-threads=1
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) cargo test --release --locked -p deepgen-model --test fuzz -- --ignored --nocapture --test-threads=1
