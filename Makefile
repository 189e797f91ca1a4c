# Every target runs from a fresh clone: what it needs is made first, inside this folder.
ENV ?= lab
PYTHON ?= python3
export ENV
# Ansible, molecule and uv keep their state here, not in the home folder.
export ANSIBLE_HOME := $(CURDIR)/.ansible
export XDG_CACHE_HOME := $(CURDIR)/.cache
export UV_CACHE_DIR := $(CURDIR)/.cache/uv
export MYPY_CACHE_DIR := $(CURDIR)/.cache/mypy
export RUFF_CACHE_DIR := $(CURDIR)/.cache/ruff
export PATH := $(CURDIR)/.venv/bin:$(PATH)

VENV := .venv/.complete
WATCHDOG_VENV := .venv-watchdog/.complete
LAB := playbooks/lab
SECRETS := inventories/$(ENV)/group_vars/all/secrets.yml
# The long ones first: two run side by side, and the short ones fill what is left.
LONG := airflow spark single watchdog backup failover haproxy postgresql
SCENARIOS := $(LONG) $(filter-out default $(LONG),$(notdir $(patsubst %/,%,$(dir $(wildcard molecule/*/molecule.yml)))))

.DEFAULT_GOAL := help
.PHONY: help lab deploy destroy test check lint unit watchdog molecule secrets locks wheelhouse docs host faults bench-failover

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

lab: ## A whole cluster on this machine: machines, site.yml, the sample DAG, a summary
	@$(LAB)/lab.sh

deploy: $(VENV) $(SECRETS) ## Run site.yml against ENV (default: lab)
	ansible-playbook site.yml -i inventories/$(ENV)/hosts.yml $(ARGS)

destroy: $(VENV) ## Remove all labs of this checkout
	@$(LAB)/as-root.sh $(LAB)/machines.py destroy

test: check molecule ## Everything: check, then every molecule scenario
	@printf '\nmake test: all passed. Skipped: nothing.\n'

check: host $(VENV) $(WATCHDOG_VENV) ## What needs no machines: lint, unit tests and the watchdog's
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint unit
	@$(MAKE) --no-print-directory watchdog

lint: $(VENV) $(WATCHDOG_VENV) ## ansible-lint (production), yamllint, ruff, mypy
	yamllint --strict .
	ansible-lint --strict
	ruff check .
	ruff format --check .
	mypy
	cd files/watchdog && $(CURDIR)/.venv-watchdog/bin/mypy

unit: $(VENV) ## Unit tests
	pytest tests/unit

watchdog: host $(WATCHDOG_VENV) ## Tests of the watchdog: 10,000 simulated histories; its parts on a real PostgreSQL and Redis
	@files/watchdog/tests/run.sh .venv-watchdog/bin/python

molecule: host $(VENV) inventories/lab/group_vars/all/secrets.yml ## The whole cluster, then one scenario per role
	@$(LAB)/molecule.sh default $(SCENARIOS)

faults: $(VENV) ## Break the lab that `make lab` left, and mend it, under load: tests/faults
	LAB_NAME=$${LAB_NAME:-lab} pytest tests/faults

bench-failover: $(VENV) ## Measure failovers on the lab that `make lab` left (ROUNDS=5); writes bench/results/failover.json
	LAB_NAME=$${LAB_NAME:-lab} PYTHONPATH=tests/faults:molecule/default/tests python bench/failover.py --rounds $${ROUNDS:-5} $${ONLY:+--only $$ONLY}

secrets: $(VENV) ## Generate what is missing of ENV's secrets, into an ansible-vault file
	ansible-playbook playbooks/secrets.yml -i inventories/$(ENV)/hosts.yml

locks: $(VENV) ## Resolve files/locks/*.in anew, with hashes
	files/locks/compile.sh

wheelhouse: $(VENV) ## Fetch and build the wheels of Debian 13's Python ahead of a deployment
	python files/locks/wheelhouse.py --name airflow --python 3.13
	python files/locks/wheelhouse.py --name spark --python 3.13
	python files/locks/wheelhouse.py --name watchdog --python 3.13 --source files/watchdog

docs: $(VENV) ## Generate docs/variables.md from the roles' argument_specs
	python docs/generate.py

host: ## Install what the lab needs on this machine, with apt
	@$(LAB)/host-packages.sh

$(VENV): files/locks/controller.txt
	$(PYTHON) -m venv --clear .venv
	@# uv first, by its own entry of the lock: it installs the rest in a fraction of pip's time.
	awk '/^uv==/ { found = 1 } found { print; if (!/\\$$/) exit }' $< > .venv/uv.txt
	.venv/bin/pip install --quiet --require-hashes --requirement .venv/uv.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes --requirement $<
	@touch $@

$(WATCHDOG_VENV): files/locks/watchdog-dev.txt $(VENV)
	uv venv --quiet --clear --python $(PYTHON) .venv-watchdog
	uv pip install --quiet --python .venv-watchdog/bin/python --require-hashes --requirement $<
	@touch $@

inventories/%/group_vars/all/secrets.yml: | $(VENV)
	ENV=$* ansible-playbook playbooks/secrets.yml -i inventories/$*/hosts.yml
