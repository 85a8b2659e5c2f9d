"""Reads a template's source: how what it writes can depend on what messages say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from jinja2 import nodes

# string methods and filters whose result depends on what is inside a string, not only at its borders
_SEARCHING: Final = frozenset({"startswith", "endswith", "split", "rsplit", "partition", "replace", "find", "count"})
_HARMLESS: Final = frozenset({"strip", "lstrip", "rstrip", "trim", "string", "safe", "tojson", "get", "items"})
_HARMLESS_TESTS: Final = frozenset(
    {"string", "none", "defined", "undefined", "mapping", "iterable", "sequence", "true", "false", "boolean"}
)
_TEXT_KEYS: Final = frozenset({"content", "reasoning_content", "thinking", "reasoning", "text"})


@dataclass(frozen=True, slots=True)
class Reading:
    """What a source says.

    searched: texts that it looks for in strings (`in`, startswith, split, replace ...). compared: texts that it compares
    with. depends_on_texts: it does more with a message's text than write it, trim it, and look for such texts in it, so
    that two texts without any of them may be treated differently.
    """

    searched: frozenset[str]
    compared: frozenset[str]
    depends_on_texts: bool


def read_source(source: str) -> Reading:
    """Raises jinja2's TemplateSyntaxError."""
    from jinja2 import Environment, nodes

    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    searched: set[str] = set()
    compared: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        texts = _constants([compare.expr, *(operand.expr for operand in compare.ops)])
        compared |= texts
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            searched |= texts
    for name, args, _ in _operations(tree):
        if name in _SEARCHING:
            searched |= _constants(part for arg in args for part in _listed(arg))
    return Reading(frozenset(searched - {""}), frozenset(compared), _depends_on_texts(tree))


def _operations(tree: nodes.Node) -> Iterator[tuple[str, list[Any], nodes.Node | None]]:
    """Methods called and filters used: name, arguments, what they are applied to."""
    from jinja2 import nodes

    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            yield call.node.attr, call.args, call.node.node
    for filtered in tree.find_all(nodes.Filter):
        yield filtered.name, filtered.args, filtered.node


def _depends_on_texts(tree: nodes.Template) -> bool:
    from jinja2 import nodes

    texts = _text_names(tree)

    def is_text(node: nodes.Node | None) -> bool:
        return node is not None and _has_text(node, texts)

    for name, args, applied_to in _operations(tree):
        looks_for_known = name in _SEARCHING and bool(args) and all(map(_is_constant, args))
        if name not in _HARMLESS and not looks_for_known and is_text(applied_to):
            return True
    if any(test.name not in _HARMLESS_TESTS and is_text(test.node) for test in tree.find_all(nodes.Test)):
        return True
    # a part of a list of parts is fine: content[0]["text"]; and of what split() gives
    parts = {id(node.node) for node in tree.find_all(nodes.Getattr)}
    parts |= {id(node.node) for node in tree.find_all(nodes.Getitem) if not _is_index(node)}
    for item in tree.find_all(nodes.Getitem):
        if _is_index(item) and id(item) not in parts and not isinstance(item.node, nodes.Call) and is_text(item.node):
            return True
    for compare in tree.find_all(nodes.Compare):
        operands = [compare.expr, *(operand.expr for operand in compare.ops)]
        is_known = any(isinstance(operand, nodes.Const) for operand in operands)
        by_order = any(operand.op not in ("eq", "ne", "in", "notin") for operand in compare.ops)
        if any(map(is_text, operands)) and (by_order or not is_known):
            return True
    return False


def _text_names(tree: nodes.Template) -> set[str]:
    """Names that stand for a message's text somewhere: by assignment, or as a macro's parameter."""
    from jinja2 import nodes

    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    names: set[str] = set()
    while True:
        found = set(names)
        for assign in tree.find_all(nodes.Assign):
            if _has_text(assign.node, names):
                found |= {name.name for name in _targets(assign.target)}
        for block in tree.find_all(nodes.AssignBlock):
            if any(_has_text(part, names) for part in block.body):
                found |= {name.name for name in _targets(block.target)}
        for loop in tree.find_all(nodes.For):
            if _has_text(loop.iter, names):
                found |= {name.name for name in _targets(loop.target)}
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                given = zip(macros[call.node.name], call.args, strict=False)
                found |= {name for name, arg in given if _has_text(arg, names)}
        if found == names:
            return names
        names = found


def _targets(target: nodes.Node) -> Iterable[Any]:
    from jinja2 import nodes

    return [target] if isinstance(target, nodes.Name | nodes.NSRef) else target.find_all(nodes.Name)


def _has_text(node: nodes.Node, names: set[str]) -> bool:
    """Whether a message's text itself, not something told about it, is in the value of an expression."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr in _TEXT_KEYS or (isinstance(node.node, nodes.Name) and node.attr in names)
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return node.arg.value in _TEXT_KEYS
        return _has_text(node.node, names)
    if isinstance(node, nodes.Compare | nodes.Test | nodes.Not):
        return False
    if isinstance(node, nodes.Call):
        if isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
            return bool(_constants(node.args) & _TEXT_KEYS)
        return any(_has_text(part, names) for part in (node.node, *node.args)) or (
            isinstance(node.node, nodes.Getattr) and _has_text(node.node.node, names)
        )
    return any(_has_text(child, names) for child in node.iter_child_nodes())


def _is_index(node: nodes.Node) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Getitem) and not (
        isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
    )


def _listed(node: nodes.Node) -> list[Any]:
    """The parts of a tuple or list, as in startswith(('a', 'b')); else the node."""
    from jinja2 import nodes

    return list(node.items) if isinstance(node, nodes.Tuple | nodes.List) else [node]


def _is_constant(node: nodes.Node) -> bool:
    from jinja2 import nodes

    return all(isinstance(part, nodes.Const) for part in _listed(node))


def _constants(expressions: Iterable[Any]) -> set[str]:
    from jinja2 import nodes

    return {node.value for node in expressions if isinstance(node, nodes.Const) and isinstance(node.value, str)}
