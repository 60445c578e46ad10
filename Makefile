# make run    register a sample case: environment, app notebook, table
# make test   every check, exactly as CI runs it
# The environment is .venv; a second call installs nothing. Without make: see "Without make" in README.md.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIN  = --constraint constraints.txt
VENV = .venv
BIN  = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
CASE = $(firstword $(wildcard data_samples/test/easy*) $(wildcard data_samples/test/*))
OUT  = out/register
SITE = out/site
ARGS =
JOBS = 2

given = -p $(1) $(if $(wildcard $(CASE)/$(2)),$(CASE)/$(2),None)

.PHONY: help run test sync notebooks docs samples

help:
	@echo "make run        register a sample case (CASE=folder for another, ARGS='-p name value' for parameters) into $(OUT)"
	@echo "make test       lint, notebooks, tests and apps: what CI runs"
	@echo "make sync       export the notebooks to spinereg/ and clean them: before every commit"
	@echo "make notebooks  execute every notebook in a fresh kernel and store its outputs"
	@echo "make docs       build the documentation site into $(SITE)"
	@echo "make samples    write data_samples again"

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "spinereg needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# runs pip and shows how far it is: in one place of a terminal, elsewhere in a line every 20 s; where it fails, the last that it said
define PROGRESS
import pathlib, shutil, subprocess, sys, sysconfig, threading, time
began, terminal, said, site = time.monotonic(), sys.stdout.isatty(), ["starting\n"], pathlib.Path(sysconfig.get_path("purelib"))
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
reader = threading.Thread(target=lambda: said.extend(line for line in process.stdout if line.strip()))
reader.start()
while reader.is_alive():
    reader.join(0.5 if terminal else 20)
    doing = next(line.strip() for line in reversed(said) if not line[0].isspace())
    line = f"{time.monotonic() - began:.0f} s, {len([*site.glob('*.dist-info')])} packages installed: {doing}"
    width = shutil.get_terminal_size().columns - 1
    print(f"\r{line[:width]:{width}}" if terminal else line[:width], end="" if terminal else "\n", flush=True)
print("\n" * terminal + "".join(said[-20:]) * (process.wait() != 0), end="")
sys.exit(process.returncode)
endef
export PROGRESS

$(VENV)/.run: $(VENV)/.python settings.ini setup.py constraints.txt
	@echo "Installing spinereg into $(VENV): some minutes the first time, nothing after that"
	@$(BIN)/python -c "$$PROGRESS" -m pip install --progress-bar off --disable-pip-version-check $(PIN) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.python settings.ini setup.py constraints.txt
	@echo "Installing spinereg and its tools into $(VENV): some minutes the first time, nothing after that"
	@$(BIN)/python -c "$$PROGRESS" -m pip install --progress-bar off --disable-pip-version-check $(PIN) --editable ".[dev]"
	@touch $(VENV)/.run $@

$(VENV)/.docs: $(VENV)/.python settings.ini setup.py constraints.txt
	@echo "Installing spinereg and what its site needs into $(VENV): some minutes the first time, nothing after that"
	@$(BIN)/python -c "$$PROGRESS" -m pip install --progress-bar off --disable-pip-version-check $(PIN) --editable ".[docs]"
	@touch $(VENV)/.run $@

define TABLE
import json, pandas, pathlib, sys
out = pathlib.Path(sys.argv[1])
table = pandas.read_csv(out / "vertebrae.csv")
wanted = ["vertebra", "aligned_distance_mm", "aligned_angle_deg", "relative_angle_deg", "residual_rms_mm", "volume_change_percent", "dice", "cut", "error_mm", "error_deg"]
if len(table):
    print(table[[name for name in wanted if name in table]].round(2).to_string(index=False))
told = json.loads((out / "metrics.json").read_text())
print(f"\n{told['verdict']}. {told['summary']}")
print("\nexecuted notebook:", (out / "register.ipynb").resolve())
endef
export TABLE

run: $(VENV)/.run
	@test -n "$(CASE)" || { echo "no case in data_samples/test: make samples writes them, make run CASE=folder takes another"; exit 1; }
	@mkdir -p $(OUT)
	$(BIN)/papermill --kernel python3 nbs/apps/register.ipynb $(OUT)/register.ipynb \
		-p fixed $(firstword $(wildcard $(CASE)/mr_t1.nii.gz $(CASE)/mr.nii.gz) $(CASE)/mr_t1.nii.gz) -p moving $(CASE)/ct.nii.gz \
		$(call given,moving_labels,ct_mask.nii.gz) $(call given,fixed_labels,mr_mask.nii.gz) $(call given,landmarks,landmarks.csv) \
		-p out_dir $(OUT) $(ARGS)
	@$(BIN)/python -c "$$TABLE" $(OUT)

# one thread per process: two processes with two threads each are slower than one
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/typos
	$(BIN)/python tests/notebooks.py --timing --n_workers $(JOBS)
	$(BIN)/pytest -n $(JOBS) --dist worksteal --durations 10

sync: $(VENV)/.test
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

# apps run from the project's top, as papermill runs them; the others from their own folder, as JupyterLab does
notebooks: $(VENV)/.test
	for notebook in nbs/*.ipynb $(wildcard nbs/tutorials/*.ipynb); do \
		$(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace $$notebook || exit 1; done
	for notebook in nbs/apps/*.ipynb; do \
		$(BIN)/papermill --kernel python3 $$notebook $$notebook || exit 1; done
	sed -i.bak "s|$(CURDIR)|/home/me/spinereg|g" nbs/apps/*.ipynb && rm nbs/apps/*.bak # they print where their files are
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

docs: $(VENV)/.docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -d out/doctrees nbs $(SITE)
	@echo "site: $(abspath $(SITE))/index.html"

samples: $(VENV)/.run
	@mkdir -p out
	$(BIN)/papermill --kernel python3 nbs/apps/samples.ipynb out/samples.ipynb -p out_dir data_samples
