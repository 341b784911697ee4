"""Run a command as a program: its flags, and its refusals in one clear line and an exit status."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class FlagError(ValueError):
    """Flags that are missing, out of range or contradict each other."""


def launch(define: Callable[[flags.FlagValues], None], main: Callable[[flags.FlagValues], None]):
    """Run one command as a program.

    A ValueError or OSError ends it with its message on one line of standard error: exit status 2
    for flags, 1 for all else. `--verbosity=1` adds the traceback.

    Args:
      define: defines the command's flags on the values given.
      main: reads the values, checks them, does the work.
    """
    define(flags.FLAGS)
    app.run(lambda argv: sys.exit(_status(main, argv)))


def _status(main: Callable[[flags.FlagValues], None], argv: Sequence[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # jax and orbax tell their users' users too much
    try:
        if argv[1:]:
            raise FlagError(
                f"{argv[1]!r} is no flag; flags look like --name=value, and a value with spaces "
                "stands in quotes."
            )
        main(flags.FLAGS)
    except (ValueError, OSError) as error:
        lines = [f"error: {error}", *getattr(error, "__notes__", ())]
        print("\n".join(lines), file=sys.stderr)
        logging.debug("where it arose:", exc_info=True)
        return 2 if isinstance(error, FlagError) else 1
    except KeyboardInterrupt as interrupt:
        print("\n".join(["interrupted", *getattr(interrupt, "__notes__", ())]), file=sys.stderr)
        return 130
    return 0
