#!/usr/bin/env bash
# Installs into .venv with the test extras and runs the suite on each backend.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh test
for backend in tensorflow torch jax; do
  echo "=== KERAS_BACKEND=$backend"
  KERAS_BACKEND=$backend .venv/bin/python -m pytest -q tests "$@"
done
