#!/usr/bin/env bash
# Check the style and run the tests, in an environment that satisfies tests/requirements.txt (made in .venv if need be).
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source experiments/environment.sh
ensure_environment "$repository/tests/requirements.txt"
"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check --quiet . || { echo "ruff format would change files; run it" >&2; exit 1; }
exec "$PYTHON" -m pytest -q --numprocesses auto --dist worksteal tests "$@"
