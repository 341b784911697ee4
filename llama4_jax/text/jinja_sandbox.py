"""The Jinja environment that authors of chat templates expect, sandboxed.

Templates come with checkpoints and checkpoints come from anywhere, so a template reaches nothing
but what it is given, and changes nothing of that.
"""

import datetime
import functools
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from llama4_jax.text.template_limits import RENDER_ERRORS, BoundedEnvironment, allowance
from llama4_jax.untrusted import shown


class _Generation(jinja2.ext.Extension):
    """Read `{% generation %} .. {% endgeneration %}` as what is inside.

    Training programs mark the assistant's words so; for a prompt it means nothing.
    """

    tags = {"generation"}  # noqa: RUF012  a class attribute by Jinja's protocol

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """Compile a template; the last ones are kept, for a long template takes 0.1 s.

    Raises:
        ValueError: The source is not Jinja.
    """
    try:
        with allowance(source):
            return _sandbox().bounded(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"The chat template is not Jinja: {shown(error.message)} (line {error.lineno})."
        ) from error
    except RENDER_ERRORS as error:
        raise ValueError(f"The chat template does not compile: {shown(str(error))}.") from error


@functools.cache
def _sandbox() -> BoundedEnvironment:
    """Make the environment; a template cannot change it, so one serves all."""
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        filters={"tojson": _tojson},
    )
    functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is, where Jinja's own filter would escape it for HTML."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    return BoundedEnvironment.concat(encoder.iterencode(value))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern[:100])
