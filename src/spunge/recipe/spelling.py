"""YAML as people mean it: a date, NO and 12:30 are text, 1e5 is a number, and an attribute's values stay as they are spelled."""

import re
from typing import Any

import yaml

# YAML 1.1, which PyYAML reads, takes NO for false, 12:30 for 750, 007 for 7 and 2024-01-05 for a date; 1.2 does not.
PLAIN = {
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    "int": (re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0b[01_]+"), "-+0123456789"),
    "float": (
        re.compile(
            r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)"
        ),
        "-+0123456789.",
    ),
}
TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(TAG) not in (*PLAIN, "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for kind, (pattern, firsts) in PLAIN.items():
    _Loader.add_implicit_resolver(TAG + kind, re.compile(rf"^(?:{pattern.pattern})$"), list(firsts))


class _Dumper(yaml.SafeDumper):
    """Quotes what `read_yaml` would take for something else than text."""


for kind, (pattern, firsts) in PLAIN.items():
    _Dumper.add_implicit_resolver(TAG + kind, re.compile(rf"^(?:{pattern.pattern})$"), list(firsts))


def write_yaml(value: Any, **options: Any) -> str:
    """YAML that `read_yaml` reads back to the same value. `options`: of yaml.dump."""
    return str(yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, **options))


def read_yaml(text: str, spelled: bool = False) -> Any:
    """The content. What stands in split.values, or all of it with `spelled`, is text as it is spelled. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_twice(node)
        inside = [values for split in _under(node, "split") for values in _under(split, "values")]
        for values in [node] if spelled else inside:
            _keep_spelling(values)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_twice(root: yaml.Node) -> None:
    """Raises a YAMLError for a key that stands twice in one mapping: the first would be lost without a word."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        keys = set()
        for item in node.value:
            waiting += item if isinstance(item, tuple) else (item,)
            if isinstance(item, tuple) and isinstance(key := item[0], yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                keys.add(key.value)


def yaml_fault(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, in a few words, with its line where that is known."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return " ".join(str(error).split())
    line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
    mend = "; indent by spaces, not by tabs" if r"'\t'" in error.problem else ""
    return f"{line}{error.problem}{mend}"


def _under(node: yaml.Node, key: str) -> list[yaml.Node]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [value for name, value in pairs if name.value == key]


def _keep_spelling(node: yaml.Node) -> None:
    """Make texts of the numbers and truth values in a node."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.removeprefix(TAG) in PLAIN:
            node.tag = TAG + "str"
        return
    for item in node.value:
        for inner in item if isinstance(item, tuple) else (item,):
            _keep_spelling(inner)
