# What people do with this project. Everything that is missing is installed first; `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help demo test check faults bench-network bench-lossless bench-stream bench-store bootstrap lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24

demo: bootstrap  ## the demonstration: a running slice is snapshot, lost, and brought back (root)
	@scripts/clean-leftovers
	@.venv/bin/geni-violin demo

test: bootstrap  ## all tests but those of `make faults`; those with real switches and VMs need root
	@scripts/clean-leftovers
	@scripts/run-tests all

faults: bootstrap  ## what takes longer: parts are killed, or made to wait, with real VMs and switches (root)
	@scripts/clean-leftovers
	@scripts/run-tests faults

check:  ## lint, types, unit and property tests; no root, some two minutes
	@scripts/bootstrap python
	@scripts/run-tests check

bench-network: bootstrap  ## measure the network: its controller, recolors, what coloring costs (root, some five minutes)
	@failed=0; for name in scale recolor overhead; do .venv/bin/python -m bench.$$name || failed=1; done; exit $$failed

bench-lossless: bootstrap  ## what snapshots and restores cost the traffic, with hold and with drop (root, some eight minutes)
	@.venv/bin/python -m bench.lossless

bench-stream: bootstrap  ## one TCP stream through a snapshot, drawn to docs/tcp-through-snapshot.png (root, some three minutes)
	@.venv/bin/python -m bench.through_snapshot

bench-store: bootstrap  ## images in and out, bytes and memory, beside zstd, a plain write and borg (root, some half an hour)
	@.venv/bin/python -m bench.store

bootstrap:  ## install what is missing: Debian packages (root), the Python environment, the guests' images
	@scripts/bootstrap

lock:  ## resolve requirements.lock anew from setup.cfg
	@scripts/bootstrap python
	.cache/bootstrap/uv/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
		--all-extras --build-constraint build-constraints.txt --upgrade -o requirements.lock

clean:  ## remove all that is built here, and what a crashed demo or test left (root); first: geni-violin down
	@if [ -x .venv/bin/geni-violin ]; then scripts/clean-leftovers; fi
	rm -rf .venv .cache demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
