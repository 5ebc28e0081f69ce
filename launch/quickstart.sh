#!/usr/bin/env bash
# Installs into .venv and fine-tunes the embedded Gemma 2 on the embedded task.
#   bash launch/quickstart.sh [jax|tensorflow|torch] [--settings ...]
set -euo pipefail
cd "$(dirname "$0")/.."
backend=jax
case "${1:-}" in jax | tensorflow | torch) backend=$1 && shift ;; esac
source launch/install.sh "$backend"
exec .venv/bin/python -m keras_gemma_ft.train --backend="$backend" \
  --run_dir=runs/quickstart --noresume "$@"
