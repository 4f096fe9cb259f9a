"""Run a script with settings of its training for which it has no option.

with_training.py SETTINGS SCRIPT ARGS, where SETTINGS is a JSON object with fields of
`training.options.Options`, such as {"early_stop": 1}.
"""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from composable.commands import options

if __name__ == "__main__":
    settings, script, *_ = sys.argv[1:]
    plain = options.training_of
    options.training_of = lambda given: dataclasses.replace(plain(given), **json.loads(settings))
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")
