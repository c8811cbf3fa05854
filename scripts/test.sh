#!/usr/bin/env bash
# Run the tests in .venv (made if missing). `--all` adds the slow ones; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements.txt requirements-dev.txt
select=(-m "not slow")
arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then select=(); else arguments+=("$argument"); fi
done
exec .venv/bin/python -m pytest ${select[@]+"${select[@]}"} ${arguments[@]+"${arguments[@]}"}
