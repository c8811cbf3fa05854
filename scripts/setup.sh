#!/usr/bin/env bash
# Create .venv, if missing, and install the given requirements files into it, if they changed.
# PYTHON names the interpreter to use (3.10 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "setup: $python is missing or older than Python 3.10; name another one as PYTHON=…" >&2
  exit 2
fi
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv
fi
for file in "$@"; do
  stamp=".venv/installed-$file"
  if ! cmp -s "$file" "$stamp"; then
    echo "installing $file into .venv (once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
    cp "$file" "$stamp"
  fi
done
