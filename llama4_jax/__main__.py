"""Run a command: `llama4 generate ...` does what `python -m experiments.generate ...` does."""

import pathlib
import runpy
import sys


def main() -> None:
    """Hand over to `experiments`, which an installed library keeps in its folder `programs`."""
    library = pathlib.Path(__file__).parent
    installed = library / "programs"
    sys.path.insert(0, str(installed if installed.is_dir() else library.parent))
    runpy.run_module("experiments", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
