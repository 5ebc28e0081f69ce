"""Lists the verbs, or runs the one that the command line names.

`python -m keras_gemma_ft VERB` and the console command `keras-gemma-ft VERB`
are the same as `python -m keras_gemma_ft.VERB`.
"""

import importlib
import json
import runpy
import sys

from keras_gemma_ft import config, runtime


def main():
    """Runs the verb that the command line names, with the rest of it."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in config.VERBS:
        module = f"keras_gemma_ft.{name}"
        sys.argv = [module, *argv]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif name in ("--help", "-help", "-h", "--helpfull"):
        print(verbs())
    else:
        near = config.did_you_mean(name, config.VERBS)
        error = f"{name!r} is no verb.{near}"
        print(f"Error: {error}\n{verbs()}", file=sys.stderr)
        print(json.dumps({"status": "error", "error": error}))
        sys.exit(runtime.MISTAKE)


def verbs():
    """The verbs, a line each, and how one is run."""
    lines = ["python -m keras_gemma_ft VERB --name=value ...", "", "Verbs:"]
    for name in config.VERBS:
        module = importlib.import_module(f"keras_gemma_ft.{name}")
        lines.append(f"  {name:9} {module.__doc__.splitlines()[0]}")
    lines += ["", "VERB --help lists the settings that the verb reads."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
