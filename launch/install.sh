# Makes .venv with the extras named in $1, at the versions of constraints.txt.
# Sourced by the other scripts; an environment that is up to date is kept.
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; PYTHON=/path/to/python3.11 names one." >&2
  exit 2
}
stamp=".venv/installed-$1"
if [ ! -e "$stamp" ] || [ launch/constraints.txt -nt "$stamp" ] \
  || [ setup.cfg -nt "$stamp" ]; then
  [ -e .venv/bin/python ] || "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --constraint launch/constraints.txt \
    --editable ".[$1]"
  touch "$stamp"
fi
