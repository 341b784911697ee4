"""Run a command as a program: its flags, and how it ends in one clear line and an exit status.

Nothing here or in what commands import at their top needs jax, so that help comes at once.
"""

import contextlib
import io
import os
import pathlib
import platform
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence

from absl import app, flags, logging

flags.disclaim_key_flags()  # what a function here defines is the calling command's own flag


class FlagError(ValueError):
    """Flags that are missing, out of range or contradict each other."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, noted and reported like an interrupt."""


def launch(define: Callable[[flags.FlagValues], None], main: Callable[[flags.FlagValues], None]):
    """Run one command as a program.

    A ValueError or OSError ends it with its message on one line of standard error: exit status 2
    for flags, 1 for all else. So do a device or a host without memory, a backend that does not
    start or cannot do what is asked, and a package that is not installed. `--verbosity=1` adds the
    traceback. An interrupt ends it with status 130 and SIGTERM with 143, so that no later command
    of a line runs. A warning is one line too.

    Args:
      define: defines the command's flags on the values given.
      main: reads the values, checks them, does the work.
    """
    define(flags.FLAGS)
    flags.DEFINE_string(
        "compilation_cache", None,
        "Folder that keeps compiled programs for the next time; off keeps none. Default: "
        "JAX_COMPILATION_CACHE_DIR, or llama4_jax in the user's cache folder.",
    )  # fmt: skip

    def work(values: flags.FlagValues) -> None:
        _keep_programs(values.compilation_cache)
        main(values)

    app.run(lambda argv: sys.exit(_status(work, argv)))


def _status(main: Callable[[flags.FlagValues], None], argv: Sequence[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # jax and orbax tell their users' users too much
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal has every character
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        if argv[1:]:
            raise FlagError(
                f"{argv[1]!r} is no flag; flags look like --name=value, and a value with spaces "
                "stands in quotes."
            )
        main(flags.FLAGS)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        _say(f"error: {error}", error)
        logging.debug("where it arose:", exc_info=True)
        return 2 if isinstance(error, FlagError) else 1
    except (RuntimeError, MemoryError, ImportError) as error:  # jax raises RuntimeErrors
        reason = str(error).partition("\n")[0][:500] or "there is none left"
        kind = "memory" if isinstance(error, MemoryError) else type(error).__name__
        _say(f"error: {kind}: {reason}; --verbosity=1 shows where it arose", error)
        logging.debug("where it arose:", exc_info=True)
        return 1
    except KeyboardInterrupt as error:
        is_term = isinstance(error, Terminated)
        _say("terminated" if is_term else "interrupted", error)
        return 128 + (signal.SIGTERM if is_term else signal.SIGINT)
    return 0


def _keep_programs(place: str | None) -> None:
    """Let jax keep compiled programs in a folder. It reads these variables when it is imported.

    Raises:
      FlagError: the folder that is asked for cannot be made.
    """
    if place == "off":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    if place is None:
        folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder()))
    else:
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.expanduser(place)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        if place is not None:
            raise FlagError(f"--compilation_cache={place} cannot be made: {error}.") from error
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def _cache_folder() -> pathlib.Path:
    """Return where the user's programs are kept, apart for each kind of processor.

    Homes are shared by machines, and a program may use instructions that another machine lacks.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    processor = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        processor = next((s for s in lines if s.startswith(("flags", "Features"))), processor)
    kind = f"{platform.machine()}-{zlib.crc32(processor.encode()):08x}"
    return pathlib.Path(home, "llama4_jax", "programs", kind)


def _say(line: str, error: BaseException) -> None:
    # In one piece, whatever threads say meanwhile.
    sys.stderr.write("\n".join([line, *getattr(error, "__notes__", ()), ""]))


def _terminate(_signal: int, _frame: object) -> None:
    raise Terminated
