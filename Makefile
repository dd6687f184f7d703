# `make demo` and `make test` each set up what they need in .venv, and reuse it.
PYTHON ?= python3
RUN ?= runs/demo
BIN := .venv/bin
INSTALLED := .venv/.installed

export HF_HUB_OFFLINE := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo tasks-demo test test-faults test-multinode bench lint clean

help:
	@echo "make demo    pre-train on synthetic scenes, score on held-out ones, write $(RUN)/report.html"
	@echo "make tasks-demo  fine-tune that model, and one from scratch, on every task; write $(RUN)/tasks/table.md"
	@echo "make test    run the tests"
	@echo "make test-faults     carry out the scenarios of docs/reliability.md (kills, full disks, a soak), write their table"
	@echo "make test-multinode  runs on two hosts made of network namespaces (root, Linux)"
	@echo "make bench   regenerate the tables under benchmarks/results"
	@echo "make lint    check style"

setup: $(INSTALLED)

$(INSTALLED): setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# One process for each GPU; where there is none, two processes on the CPU that share its cores.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
demo: export DS_ACCELERATOR := cpu
demo: export OMP_NUM_THREADS := $(shell expr \( $$(nproc) + 1 \) / 2)
demo: PROCESSES := --num_accelerators 2
tasks-demo: ROWS := processes=2
endif

demo: $(INSTALLED)
	$(BIN)/meter-fast data scenes $(RUN)/data
	$(BIN)/deepspeed $(PROCESSES) --module meter_fast.train pretrain size=tiny data.root=$(RUN)/data run.dir=$(RUN)
	$(BIN)/meter-fast report $(RUN)

# Goes on from the demo, and makes it where there is none.
tasks-demo: $(INSTALLED)
	test -d $(RUN)/export || $(MAKE) demo
	$(BIN)/meter-fast train transfer size=tiny init=$(RUN) data.root=$(RUN)/data run.dir=$(RUN)/tasks seeds=0,1,2 $(ROWS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not faults"

test-faults: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m scenario -p tests.scenario_table

test-multinode: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m multinode tests/training

# The largest batches of which 24 GB hold the plain form: one side at a time, by itself. What is set is set for both
# sides, see meter_fast/host_memory.py.
HEAP := GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0
APART := --zero 0 --one-at-a-time --rounds 1
bench: $(INSTALLED)
	$(HEAP) $(BIN)/python -m benchmarks.step_time $(APART) --case pretrain_288 --dtype bf16 --batch 28
	$(HEAP) $(BIN)/python -m benchmarks.step_time $(APART) --case pretrain_224 --dtype bf16 --batch 44
	$(HEAP) $(BIN)/python -m benchmarks.step_time $(APART) --case pretrain_288 --dtype fp32 --batch 14
	$(HEAP) $(BIN)/python -m benchmarks.step_time $(APART) --case pretrain_224 --dtype fp32 --batch 22
	$(HEAP) $(BIN)/python -m benchmarks.step_time $(APART) --case nlvr2_288 --dtype bf16 --batch 28
	$(HEAP) $(BIN)/python -m benchmarks.step_time $(APART) --case nlvr2_288 --dtype fp32 --batch 14
	$(HEAP) $(BIN)/python -m benchmarks.step_time $(APART) --case vqa_576 vqa_576_5 --batch 5
	$(BIN)/python -m benchmarks.step_time --case retrieval_384 --size tiny --zero 0
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.retrieval
	$(BIN)/python -m benchmarks.latency --task answer --image-size 576 --batch 1 --dtype bf16 fp32 --rounds 3
	$(BIN)/python -m benchmarks.latency --task answer --image-size 576 --batch 5 --texts 5 --dtype bf16 fp32 --rounds 3
	$(BIN)/python -m benchmarks.latency --size tiny --rounds 10
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.data_pipeline
	$(BIN)/python -m benchmarks.plots

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs build *.egg-info
