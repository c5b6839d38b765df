"""YAML as people mean it: a date, NO and 12:30 are text, 1e5 is a number, and an attribute's values stay as they are spelled."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
READ = {TAG + kind for kind in (*PLAIN, "null", "str", "seq", "map", "merge")}  # what JSON has too, and YAML's <<
LARGEST = 1 << 20  # characters of a text, which take seconds
DEEPEST = 60  # brackets in brackets
MOST_VALUES = 100_000  # in a text, an alias counting as all that it stands for
NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")  # no file can hold half of a character, and no path a NUL


class _ForeignLoader(yaml.SafeLoader):
    """PyYAML's own, but for a limit: it looks at all open brackets again with every word that follows them."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803
        if self.flow_level >= DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        super().fetch_flow_collection_start(TokenClass)


class _Loader(_ForeignLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012
        first: [
            (tag, pattern) for tag, pattern in resolvers if tag.removeprefix(TAG) not in (*PLAIN, "timestamp", "value")
        ]
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


def yaml_text(file: Path) -> str:
    """A file's text. Raises yaml.YAMLError for one that is too large, and what `read_text` raises."""
    if (size := file.stat().st_size) > 4 * LARGEST:
        raise yaml.YAMLError(f"it has {size} bytes")
    return file.read_text(encoding="utf-8")


def read_yaml(text: str, spelled: bool = False) -> Any:
    """The content, of what JSON has too: mappings of texts, lists, texts, numbers, truth values, null. What stands in
    split.values, or all of it with `spelled`, is text as it is spelled, and so is every key. Raises yaml.YAMLError."""
    with _faults_told():
        loader = _Loader(_of_some_length(text))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {}, plain=True)
            inside = [values for split in _under(node, "split") for values in _under(split, "values")]
            for values in [node] if spelled else inside:
                _keep_spelling(values)
            return loader.construct_document(node)
        finally:
            loader.dispose()


def read_foreign_yaml(text: str) -> list[Any]:
    """The documents of a text that others wrote, as PyYAML's safe loader reads them. Raises yaml.YAMLError."""
    documents = []
    with _faults_told():
        loader = _ForeignLoader(_of_some_length(text))
        try:
            while loader.check_node() and (node := loader.get_node()) is not None:
                _size(node, {}, plain=False)
                documents.append(loader.construct_document(node))
        finally:
            loader.dispose()
    return documents


@contextmanager
def _faults_told() -> Iterator[None]:
    """PyYAML has errors of its own for what it cannot parse, and for values that are not what their tags say it has Python's."""
    try:
        yield
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except Exception as error:
        raise yaml.YAMLError(f"a value in it is not what it should be: {error}") from None


def _of_some_length(text: str) -> str:
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it has {len(text)} characters, more than {LARGEST}")
    return text


def _size(node: yaml.Node, sizes: dict[int, int], plain: bool) -> int:
    """How many values a node holds, an alias counting as all that it stands for.

    Raises a YAMLError for too many of them, for what holds itself, and for a key that stands twice: the first would be lost
    without a word. plain: also for what JSON has no word for, and for text that no file can hold; keys become text.
    `sizes`: of the nodes that were seen.
    """
    if plain and node.tag not in READ:
        raise yaml.MarkedYAMLError(None, None, f"a value with the tag {node.tag!r} is not read", node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        if plain and (odd := NO_TEXT.search(node.value)):
            raise yaml.MarkedYAMLError(None, None, f"a text holds {odd[0]!a}, which is no character", node.start_mark)
        return 1
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.MarkedYAMLError(None, None, "an alias stands for what it is in", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
        if plain:
            node.value = [(_key(key), value) for key, value in node.value]
    size = 1
    for item in node.value:
        size += sum(_size(inner, sizes, plain) for inner in (item if isinstance(item, tuple) else (item,)))
        if size > MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {MOST_VALUES} values, aliases counting as what they stand for")
    sizes[id(node)] = size
    return size


def _refuse_twice(node: yaml.MappingNode) -> None:
    keys = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            keys.add(key.value)


def _key(node: yaml.Node) -> yaml.Node:
    """A key as text, as it is spelled; what merges another mapping stays."""
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(None, None, "a key is a list or a mapping, not a text", node.start_mark)
    if node.tag not in READ - {TAG + "merge", TAG + "str"}:
        return node
    return yaml.ScalarNode(TAG + "str", node.value, node.start_mark, node.end_mark)


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
