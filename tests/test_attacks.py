"""The attack program in small; benchmarks/attack.py has hundreds of cases."""

import json
import subprocess
import sys

from helpers import ROOT


def test_a_few_attacks():
    command = f"{sys.executable} benchmarks/attack.py --kills 2 --races 1 --damages 4".split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    attacks = {"kills": 2, "races": 2, "damages": 2, "flips": 2}
    assert {name: count for name, count in result.items() if count and name != "seconds"} == attacks
