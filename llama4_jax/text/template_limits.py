"""Bounds of what a chat template may do: how often it acts, and how much it makes.

A template is a program of somebody else's, and Jinja's sandbox bounds none of its work. Here every
turn of a loop, every call and every operation that makes a value is counted, and what would make
too much is refused before it does. The allowance grows with the dialogue, so that an honest
template stays far below it.
"""

import contextlib
import contextvars
import functools
import re
import time
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
"""Most turns, calls and operations, besides 32 for each character of the dialogue."""
MAX_SIZE = 1 << 24
"""Most characters and items that are made, besides 32 for each character of the dialogue."""
MAX_SECONDS = 10.0
"""Most processor time, for operations that take long and make little."""
_MAX_WIDTH = 1 << 16
_MAX_BITS = 4096

_FILTERS_LEFT_OUT = ("batch", "slice", "center", "wordwrap", "urlize", "xmlattr", "pprint")
_METHODS_LEFT_OUT = ("encode", "expandtabs", "translate", "to_bytes")
"""What makes much of little, and no dialogue needs."""


class Allowance:
    """What one rendering may still do.

    Args:
      data: what the template reads, by the size of which the allowance grows.
    """

    def __init__(self, data: Any) -> None:
        self._sizes: dict[int, tuple[int, Any]] = {}
        size = self.size(data)
        self._left = self._most = MAX_SIZE + 32 * size
        self._steps = MAX_STEPS + 32 * size
        self._until = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        """Count one action."""
        self._steps -= 1
        is_over = self._steps < 0 or time.thread_time() > self._until
        _refuse_if(is_over, "it does not come to an end")

    def expect(self, size: int) -> None:
        """Refuse to make so many characters or items."""
        _refuse_if(size > self._left, f"it makes more than {self._most} characters")

    def made[T](self, value: T) -> T:
        """Count a value that was made, and return it."""
        self.step()
        if isinstance(value, str | list | tuple | dict):
            self.expect(len(value))
            self._left -= len(value)
            self.expect(self.size(value) - self._most)
        return value

    def size(self, value: Any) -> int:
        """Return about how many characters a value has when it is written out.

        What is in it several times counts as often: a few lists of lists may write out to millions.
        """
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 3
        if not isinstance(value, list | tuple | dict):
            return 8
        if id(value) not in self._sizes:
            items = [*value, *value.values()] if isinstance(value, dict) else value
            # The value is kept, so that no other gets its id.
            self._sizes[id(value)] = (1 + sum(map(self.size, items)), value)
        return self._sizes[id(value)][0]


RENDER_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RecursionError, SyntaxError, TypeError, ValueError),
)
"""What a program in Jinja may die of, while it is compiled or while it runs."""


def _refuse_if(condition: bool, reason: str) -> None:
    if condition:
        raise jinja2.TemplateError(reason)


_current = contextvars.ContextVar[Allowance]("allowance")


@contextlib.contextmanager
def allowance(data: Any) -> Generator[None]:
    """Compile or render a template with an allowance that suits its data."""
    token = _current.set(Allowance(data))
    try:
        yield
    finally:
        _current.reset(token)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose templates act within the current `allowance`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(**options)
        self.add_extension(_TokensFirst)
        known: dict[str, Any] = {**self.filters, **filters}
        kept = [name for name in known if name not in _FILTERS_LEFT_OUT]
        self.filters = {name: _counted(name, known[name]) for name in kept}
        self.filters.update({"_each": _each, "_made": _made})
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def bounded(self, source: str) -> jinja2.Template:
        """Compile a template that counts."""
        tree = _Counting().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # pyrefly: ignore[bad-override]
        """Join what the template, or a block of it, writes."""
        return "".join(map(_current.get().made, pieces))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _METHODS_LEFT_OUT and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        current = _current.get()
        if operator == "%" and isinstance(left, str):
            _expect_format(left, right)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (right if operator == "**" else 2)
            _refuse_if(max(bits, right.bit_length()) > _MAX_BITS, "it computes with large numbers")
        elif operator == "*":
            current.expect(_times(left) * _times(right))
        return current.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        current, name = _current.get(), getattr(function, "__name__", "")
        if name in ("format", "format_map"):
            _expect_format(function.__wrapped__.__self__, [*args, kwargs])
        elif isinstance(function, types.BuiltinMethodType):
            owner = function.__self__
            if name == "join":
                args = (list(*args),)
                _expect_join(*args, owner)
            elif name == "replace":
                _expect_replace(owner, *args)
            else:
                wide = any(isinstance(n, int) and n > _MAX_WIDTH for n in args)
                _refuse_if(wide, f"it gives {name} a number above {_MAX_WIDTH}")
        return current.made(super().call(context, function, *args, **kwargs))


class _TokensFirst(Extension):
    """Read all tokens before any is parsed: a generator dies badly where recursion ends."""

    def filter_stream(self, stream: TokenStream) -> list[Token]:  # pyrefly: ignore[bad-override]
        return list(stream)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that is not written out: it may be in itself, several times."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Counting(NodeTransformer):
    """Let loops, comparisons and literals of containers count, and `~` join as + does."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        texts = [_filtered(part, "string") for part in node.nodes]
        return functools.reduce(lambda a, b: nodes.Add(a, b, lineno=node.lineno), texts)

    def _value(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filtered(node, "_made")

    visit_List = visit_Dict = visit_Tuple = visit_Compare = visit_Test = _value


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context  # so that it is not computed when the template is compiled
def _each(_: Context, values: Iterable[Any]) -> Iterator[Any]:
    current = _current.get()
    for value in values:
        current.step()
        yield value


@jinja2.pass_context
def _made(_: Context, value: Any) -> Any:
    return _current.get().made(value)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts what it makes, and is asked first how much that is."""
    expect = _EXPECT.get(name)
    first = int(hasattr(function, "jinja_pass_arg"))  # its value comes behind what Jinja passes

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if isinstance(args[first], Iterator | range):
            args = (*args[:first], [*args[first]], *args[first + 1 :])
        if expect is not None:
            expect(*args[first:], **kwargs)
        return _current.get().made(function(*args, **kwargs))

    return counted


def _times(value: Any) -> int:
    return value if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 1


def _expect_join(values: Any, d: Any = "", attribute: Any = None) -> None:
    current = _current.get()
    if isinstance(values, list | tuple | dict):
        current.expect(len(values) * len(str(d)) + current.size(values))


def _expect_replace(s: Any, old: Any, new: Any, count: Any = None) -> None:
    _current.get().expect(str(s).count(str(old)) * len(str(new)))


def _expect_indent(s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    _current.get().expect((1 + str(s).count("\n")) * _times(width))


def _expect_sum(values: Any, attribute: Any = None, start: Any = 0) -> None:
    _refuse_if(not isinstance(start, int | float), "sum is for numbers")


def _expect_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    _refuse_if(abs(precision) > 99, "it rounds to more than 99 places")


def _expect_json(value: Any, ascii: Any = False, indent: Any = None, *_: Any, **__: Any) -> None:
    _refuse_if(_times(indent) > 99, "it indents by more than 99 characters")


def _expect_format(text: Any, *values: Any) -> None:
    current = _current.get()
    _refuse_if(
        _WIDE.search(str(text)) is not None, "a format has a width above 9999, or computes one"
    )
    places = str(text).count("%") + str(text).count("{")
    current.expect(places * sum(map(current.size, values)))


_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*(:[^{}]*\d{5}|:[^{}]*\{)")
_EXPECT = {
    "format": _expect_format,
    "indent": _expect_indent,
    "join": _expect_join,
    "replace": _expect_replace,
    "round": _expect_round,
    "sum": _expect_sum,
    "tojson": _expect_json,
}
