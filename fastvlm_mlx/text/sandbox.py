"""Chat templates in a sandbox: they are programs of whoever made the model, and can't run away.

Jinja's own sandbox keeps a template from Python's insides, but not from looping for hours or from
filling the memory. Here each step of a template is paid from a budget: every round of a loop, call,
filter, test, operator and output, and with it every character and item that it reads or could make.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, ItemsView, KeysView, Sequence, ValuesView
from contextvars import ContextVar
from functools import cache, wraps
from inspect import unwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

BUDGET = 30_000_000  # characters of one rendering, four times what a chat of 300,000 takes
PER_ITEM = 30  # of these, for an item of a list or mapping: looking at one takes longer
STEP = 100  # of these, for a step by itself: a second or two are 300,000 steps
UNBOUNDED = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*\{")  # formats whose widths are arguments
FORMATS = ("format", "format_map")
# fmt: off
# Filters, tests and methods that take the same time for everything, and those that make no more
# than they read. All others may make as much as the product of what they read.
CONSTANT = {
    "length", "count", "first", "last", "default", "d", "attr", "defined", "undefined",
    "none", "true", "false", "boolean", "integer", "number", "mapping", "sequence",
    "iterable", "callable", "sameas", "filter", "test",
}
LINEAR = {
    "split", "rsplit", "splitlines", "partition", "rpartition", "strip", "lstrip", "rstrip",
    "trim", "removeprefix", "removesuffix", "startswith", "endswith", "find", "rfind",
    "index", "lower", "upper", "title", "capitalize", "list", "map", "select", "selectattr",
    "reject", "rejectattr", "equalto", "eq", "ne", "in", "get", "items", "keys", "values",
}
# fmt: on
_left: ContextVar[int] = ContextVar("what is left of the budget of this rendering")


class TemplateTooLong(ValueError):
    """A template takes more steps or memory than any chat needs."""


def render(template: str, **variables: Any) -> str:
    """A template's text, rendered as transformers renders chat templates.

    Raises:
        Exception: of any type, since a template is a program; `TemplateTooLong` if it does not end
            soon.
    """
    compiled = _compiled(template)
    token = _left.set(BUDGET)
    try:
        return compiled.render(**variables)
    finally:
        _left.reset(token)


def _spend(cost: int) -> None:
    left = _left.get() - STEP - cost
    _left.set(left)
    if left < 0:
        raise TemplateTooLong("it takes more steps or memory than any chat needs")


def _size(value: Any, as_count: bool = False) -> int:
    """How many characters and items a value has, all inner ones included; at least 1.

    Args:
        value: any value.
        as_count: a whole number is how often something is done or how wide it is made. Otherwise it
            has its digits.
    """
    total, waiting = 0, [value]
    while waiting and total <= BUDGET:  # it may hold itself, or the same thing many times
        found = waiting.pop()
        total += 1
        if isinstance(found, int):
            total += abs(found) if as_count else found.bit_length()
        elif isinstance(found, (str, bytes, range, KeysView, ValuesView, ItemsView)):
            total += len(found)
        elif isinstance(found, (list, tuple, set, frozenset, dict)):
            total += PER_ITEM * len(found)
            waiting += found
            if isinstance(found, dict):
                waiting += found.values()
    return total


def _counted(value: Any) -> Any:
    """The value itself, paid for."""
    _spend(_size(value))
    return value


def _rounds(values: Any) -> Any:
    """What a loop goes through, each round paid for."""
    for value in values:
        _spend(0)
        yield value


def _pay_for_call(name: str, values: Sequence[Any]) -> None:
    """Pay for the most that a function could make of its arguments."""
    cost = 1
    for size in (_size(value, as_count=name not in LINEAR) for value in values):
        cost = min(cost + size if name in LINEAR else cost * size, BUDGET + 1)
    if name in FORMATS:
        cost *= _widest(values[0])
    _spend(cost)


def _widest(text: Any) -> int:
    """The largest width that a format may name."""
    if UNBOUNDED.search(str(text)):
        raise TemplateTooLong("it formats to a width that is not written in the format")
    return max((int(digits) for digits in re.findall(r"\d+", str(text))), default=1)


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that pays for its arguments and its result."""

    @wraps(function)
    def call(*values: Any, **named: Any) -> Any:
        if name in CONSTANT:
            _spend(0)
            return function(*values, **named)
        _pay_for_call(name, [*values, *named.values()])
        return _counted(function(*values, **named))

    return call


def _pay_for_operator(operator: str, left: Any, right: Any) -> None:
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    as_count = operator == "**" or not numbers
    sizes = _size(left, as_count), _size(right, as_count)
    cost = sum(sizes) if operator in "+-" else sizes[0] * sizes[1]
    if operator == "%" and isinstance(left, str):
        cost *= _widest(left)
    _spend(cost)


@cache
def _compiled(template: str) -> jinja2.Template:
    """A chat template in the environment that transformers gives it, with every step paid for."""
    from jinja2 import Template

    environment = _environment()
    tree = environment.parse(template)
    _mark(tree)
    return Template.from_code(
        environment, environment.compile(tree), environment.make_globals(None)
    )


def _mark(tree: Any) -> None:
    """Have everything paid for that is neither a call, a filter, a test nor an operator."""
    from jinja2 import nodes

    def pay(node: Any, name: str = "counted") -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    for loop in list(tree.find_all(nodes.For)):
        loop.iter = pay(loop.iter, "rounds")
    for joined in list(tree.find_all(nodes.Concat)):
        joined.nodes = [pay(node) for node in joined.nodes]
    for output in list(tree.find_all(nodes.Output)):
        output.nodes = [
            pay(nodes.Const(node.data, lineno=node.lineno))
            if isinstance(node, nodes.TemplateData)
            else pay(node)
            for node in output.nodes
        ]
    for compared in list(tree.find_all(nodes.Compare)):
        compared.expr = pay(compared.expr)
        for operand in compared.ops:
            operand.expr = pay(operand.expr)
    for item in list(tree.find_all(nodes.Getitem)):
        if isinstance(item.arg, nodes.Slice):
            item.node = pay(item.node)
    tree.set_environment(tree.environment)


@cache
def _environment() -> jinja2.Environment:
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.runtime import Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _pay_for_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *values: Any, **named: Any) -> Any:
            given = [*values, *named.values()]
            if isinstance(__obj, (Macro, type)):  # a macro pays for what it does, and a class keeps
                _spend(_size(given))
            else:
                owner = getattr(unwrap(__obj), "__self__", None)  # Jinja wraps formats
                _pay_for_call(getattr(__obj, "__name__", ""), [owner, *given])
            return _counted(super().call(__context, __obj, *values, **named))

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        optimized=False,
    )
    environment.filters["tojson"] = to_json
    tables: list[dict[str, Any]] = [environment.filters, environment.tests]
    for table in tables:
        table.update({name: _paid(name, function) for name, function in table.items()})
    environment.filters |= {"counted": _counted, "rounds": _rounds}
    del environment.globals["lipsum"]  # filler text, at great length
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
