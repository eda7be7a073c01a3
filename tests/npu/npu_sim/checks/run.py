"""`run.py MODULE`: every check_* function of a module of this folder, in a process that sees simulated NPUs.

Prints {name: null or what went wrong} as JSON in its last line.
"""

import importlib
import json
import sys
import traceback


def main(module_name):
    module, results = importlib.import_module(module_name), {}
    for name, check in list(vars(module).items()):
        if name.startswith("check_"):
            try:
                results[name] = check()
            except BaseException:  # the others still run
                results[name] = traceback.format_exc()
    print(json.dumps(results), flush=True)


main(sys.argv[1])
