# Sourced by the experiments and the test runner. `ensure_environment FILE` sets PYTHON to an interpreter that
# satisfies the requirements file: the one at hand if it does, else the one in .venv, which is made and filled.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

satisfies() {  # satisfies PYTHON FILE
    "$1" - "$2" <<'PY' 2>/dev/null
import sys
from importlib import metadata
from pathlib import Path
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

def lines(path):
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            yield from lines(path.parent / line[3:].strip())
        elif line.strip():
            yield line

wanted = map(Requirement, lines(Path(sys.argv[1])))
sys.exit(not all(r.specifier.contains(metadata.version(r.name).split("+")[0]) for r in wanted))
PY
}

ensure_environment() {
    local requirements=$1 at_hand
    for at_hand in python python3; do
        if command -v "$at_hand" >/dev/null && satisfies "$at_hand" "$requirements"; then
            PYTHON=$at_hand
            return
        fi
    done
    PYTHON=$repository/.venv/bin/python
    if ! satisfies "$PYTHON" "$requirements"; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "Python 3.11 or later is needed; this is $(python3 --version)" >&2
            return 2
        }
        echo "installing $(basename "$(dirname "$requirements")")/$(basename "$requirements") into .venv" >&2
        [ -x "$PYTHON" ] || python3 -m venv "$repository/.venv" || return 2
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" \
            -c "$repository/tests/constraints.txt" >&2 || return 2
    fi
}
