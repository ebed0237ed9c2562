"""What a chat template expects of messages, read from its syntax tree, by the rules of vLLM's renderer.

A template that loops over a message's content wants it as parts ("openai"); others want text ("string"). vLLM decides
so unless told with --chat-template-content-format, and what it decides is in the tokens.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ContentFormat = Literal["string", "openai"]

_CONTENT = "content"


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; what stands in it is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])


@lru_cache(maxsize=64)
def content_format(template: str) -> ContentFormat:
    """How a template wants messages' content. One that cannot be parsed wants text; to render it will tell."""
    try:
        tree = _environment().parse(template)
    except TemplateError:
        return "string"
    return "openai" if any(_content_loops(tree)) else "string"


@lru_cache(maxsize=64)
def variables(template: str) -> frozenset[str]:
    """The variables that a template reads and does not set. Raises jinja2.TemplateError for what is no template."""
    return frozenset(find_undeclared_variables(_environment().parse(template)))


def knows_developers(template: str) -> bool:
    """Whether a template says something of the role `developer`."""
    return '"developer"' in template or "'developer'" in template


def _content_loops(tree: nodes.Template) -> Iterator[nodes.For]:
    """Loops over a message's content, over what is called `content`, or over a macro's parameter that is given it."""
    messages = _message_names(tree)
    in_macros: set[int] = set()
    given: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        names = _content_parameters(tree, macro, messages)
        for loop in macro.find_all(nodes.For):
            in_macros.add(id(loop))
            given[id(loop)] = names
    for loop in tree.find_all(nodes.For):
        source = loop.iter
        name = source.name if isinstance(source, nodes.Name) else None
        if (
            any(_reads(source, message, _CONTENT) for message in messages)
            or name in given.get(id(loop), ())
            or (name == _CONTENT and id(loop) not in in_macros)
        ):
            yield loop


def _message_names(tree: nodes.Template) -> list[str]:
    """What loops over `messages`, or over what was set from it, call a message."""
    alike = ["messages"]
    for name in alike:  # grows meanwhile
        alike += [
            assign.target.name
            for assign in tree.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name) and assign.target.name not in alike and _reads(assign.node, name)
        ]
    return [
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and any(_reads(loop.iter, name) for name in alike)
    ]


def _content_parameters(tree: nodes.Template, macro: nodes.Macro, messages: list[str]) -> set[str]:
    """The parameters of a macro that some call gives a message's content."""
    names = [argument.name for argument in macro.args]
    found: set[str] = set()
    for call in tree.find_all(nodes.Call):
        if not isinstance(call.node, nodes.Name) or call.node.name != macro.name:
            continue
        given = [*zip(names, call.args, strict=False), *((one.key, one.value) for one in call.kwargs)]
        found |= {
            name for name, value in given if name in names and any(_reads(value, one, _CONTENT) for one in messages)
        }
    return found


def _reads(node: nodes.Node | None, name: str, field: str | None = None) -> bool:
    """Whether an expression is a variable, or its field, whatever filters, tests and slices are applied to it."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _reads(node.node, name, field)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _reads(node.node, name, field)
    if field is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
    if isinstance(node, nodes.Getattr):
        return node.attr == field and _reads(node.node, name)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value == field and _reads(node.node, name)
    return False
