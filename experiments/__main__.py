"""Run a command by its name: `llama4 NAME ...` or `python -m experiments NAME ...`."""

import ast
import pathlib
import runpy
import sys


def commands() -> dict[str, str]:
    """Return the commands by name, each with the first line of what it says of itself."""
    here = pathlib.Path(__file__).parent
    files = {path.stem: path for path in here.glob("[!_]*.py")}
    files |= {path.parent.name: path for path in here.glob("*/__main__.py")}
    texts = {name: path.read_text("utf-8") for name, path in sorted(files.items())}
    return {
        name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        for name, text in texts.items()
        if '__name__ == "__main__"' in text
    }


def main() -> None:
    """Run the command that the first argument names."""
    known, name = commands(), sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in known:
        del sys.argv[1]
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
        return
    if name not in ("--help", "--helpshort", "help"):
        names = ", ".join(known)
        print(f"error: {name!r} is no command; choose from {names}.", file=sys.stderr)
        sys.exit(2)
    width = max(map(len, known))
    print("llama4 COMMAND --flag=value ...; --helpshort after a command shows its flags.\n")
    print("\n".join(f"  {name:{width}}  {what}" for name, what in known.items()))


if __name__ == "__main__":
    main()
