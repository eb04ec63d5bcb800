"""The GPU path, checked and measured by one command: see cuda_checks.py, or --help.

NVIDIA's Python package is called `cuda` too, and torch imports it. To programs of this folder, which is the first on
their path, this file would be that package: whoever imports it is handed the package, or told that there is none.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if __name__ == "__main__":
    from cuda_checks import main

    main(sys.argv[1:])
elif __name__ == "cuda":
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("cuda", [path for path in sys.path if Path(path).resolve() != here])
    if spec is None:
        raise ModuleNotFoundError("No module named 'cuda'", name="cuda")
    package = sys.modules["cuda"] = module_from_spec(spec)
    spec.loader.exec_module(package)
