#!/usr/bin/env bash
# Set up .venv and train the default job: a small TRM on generated 4×4 Sudoku, a few minutes.
# Arguments go to pretrain.py, as in `bash scripts/quickstart.sh experiment=sudoku6`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements.txt
exec .venv/bin/python pretrain.py "$@"
