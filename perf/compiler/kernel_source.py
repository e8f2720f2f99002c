"""What a kernel is made of, as a hash: are facts of its compiled code still those of this kernel?

The hash is of its syntax tree and of those of all that it calls, without comments and docstrings.
So a change of words asks for no new facts. Rows of results files have another hash, of whole files:
`aot.source_hash`.
"""

import ast
import functools
import hashlib
import inspect
import json
import textwrap
import types
from typing import Any


@functools.cache
def source_hash(kernel: Any) -> str:
    """The hash of a kernel that `@triton.jit` has made, interpreted or compiled."""
    return hashlib.sha256(json.dumps(source(kernel)).encode()).hexdigest()


def source(function: Any, seen: dict | None = None) -> list:
    """What a kernel is made of, for a hash: its syntax tree, and those of all that it calls.

    Comments, docstrings and line numbers are not in it; the values of globals are. What triton
    brings along goes by triton's version. The list is in the order in which names are met.
    """
    seen = {} if seen is None else seen
    if function in seen:
        return []
    seen[function] = True
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body
    names = inspect.getclosurevars(function.fn).nonlocals
    names = function.fn.__globals__ | names
    found = [_tree(tree)]
    for name in dict.fromkeys(_dotted(node) for node in ast.walk(tree)):
        if name is None or name[0] not in names:  # a local variable or Python's own
            continue
        value = names[name[0]]
        for attribute in name[1:]:
            value = (
                getattr(value, attribute, None) if isinstance(value, types.ModuleType) else value
            )
        found += _value(name, value, seen)
    return found


def _dotted(node: ast.AST) -> tuple[str, ...] | None:
    """("tl", "load") of `tl.load`, ("x",) of `x`; None of anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return (*before, node.attr)
    return None


def _value(name: tuple[str, ...], value: Any, seen: dict) -> list:
    """What a global stands for, in the list of `source`."""
    if hasattr(value, "fn"):  # `@triton.jit`
        return [] if value.fn.__module__.startswith("triton.") else source(value, seen)
    if type(value).__name__ == "constexpr":
        value = value.value
    elif getattr(value, "__module__", "").startswith("triton."):
        return [] if callable(value) else [[".".join(name), str(value)]]  # a function, or a dtype
    if isinstance(value, types.ModuleType):
        return []
    if isinstance(value, (int, float, str, tuple, type(None))):
        return [[".".join(name), repr(value)]]
    raise TypeError(f"{'.'.join(name)} is {value!r}: kernel_source.py cannot tell when it changes")


def _tree(node: Any) -> Any:
    """A syntax tree as lists, alike in every version of Python."""
    if isinstance(node, list):
        return [_tree(x) for x in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    kept = {k: v for k, v in fields.items() if v not in (None, []) and k not in ("ctx", "kind")}
    return [type(node).__name__, {k: _tree(v) for k, v in kept.items()}]
