#!/usr/bin/env bash
# Installs into .venv with the test extras, checks the code's form, and runs the
# suite on each backend, in two processes.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
for backend in tensorflow torch jax; do
  echo "=== KERAS_BACKEND=$backend"
  KERAS_BACKEND=$backend .venv/bin/python -m pytest -q -n 2 \
    --dist loadfile tests "$@"
done
