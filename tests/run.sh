#!/usr/bin/env bash
# Run the tests, in an environment that satisfies tests/requirements.txt (made in .venv if need be).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source experiments/environment.sh
ensure_environment "$repository/tests/requirements.txt"
exec "$PYTHON" -m pytest -q tests "$@"
