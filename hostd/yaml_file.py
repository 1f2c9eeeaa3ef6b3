"""A YAML file whose every value knows its line, so that whoever refuses a value can say where it stands.

Reading is stricter than YAML: a repeated key and an alias are refused. Each refusal is one VfleetError INVALID_FIELD
whose message is `FILE:LINE: FIELD is VALUE; expected ...`.
"""

from pathlib import Path

import yaml

from vfleet.errors import FieldViolation, Reason, VfleetError

FieldPath = tuple[str | int, ...]
"""How to get to a value from the document's root, for example ("hosts", 1, "name")."""


def format_path(path: FieldPath) -> str:
    """Return a path as messages write it, for example `hosts[1].name`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".") or "the document"


class YamlFile:
    """A YAML file as read: `data`, made of mappings, lists and scalars, and the lines that its values stand on.

    Raise VfleetError INVALID_FIELD for a file that can't be read, isn't UTF-8 or isn't one YAML document.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[FieldPath, int] = {(): 1}
        self._seen: set[int] = set()
        self._loader = yaml.SafeLoader(self._text())
        try:
            node = self._loader.get_single_node()
            self.data: object = None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self._refusal(mark.line + 1 if mark else 1, "the document", f"is not YAML: {error.problem}") from None
        except RecursionError:
            raise self._refusal(1, "the document", "is nested too deeply to be read") from None
        finally:
            self._loader.dispose()

    def refuse(self, path: FieldPath, description: str) -> VfleetError:
        """Return the error for the value at `path`, at its line or that of what is nearest above.

        `description` goes after the field: "is VALUE; expected ...".
        """
        known = path
        while known not in self._lines:
            known = known[:-1]
        return self._refusal(self._lines[known], format_path(path), description)

    def _text(self) -> str:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise self._refusal(0, "the file", f"is not readable: {error.strerror}") from None
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise self._refusal(
                line, "the file", f"is not text: byte {content[error.start]:#04x}; expected UTF-8"
            ) from None
        unprintable = yaml.reader.Reader.NON_PRINTABLE.search(text)
        if unprintable:
            line = text.count("\n", 0, unprintable.start()) + 1
            raise self._refusal(line, "the file", f"has {unprintable[0]!r}; expected printable characters")
        return text

    def _refusal(self, line: int, field: str, description: str) -> VfleetError:
        place = f"{self.path}:{line}" if line else str(self.path)
        return VfleetError(
            Reason.INVALID_FIELD,
            f"{place}: {field} {description}",
            metadata={"field": field, "file": str(self.path), "line": str(line)},
            violations=(FieldViolation(field, description),),
        )

    def _value(self, node: yaml.Node, path: FieldPath) -> object:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if id(node) in self._seen:
            raise self.refuse(path, "is an alias; expected the value written out")
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        try:
            return self._loader.construct_object(node)
        except ValueError:
            raise self.refuse(path, f"is {node.value[:60]!r}; expected a value that exists") from None

    def _mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str | int, object]:
        mapping: dict[str | int, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._value(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise self._refusal(line, format_path(path), "has a key that is no text or number; expected a name")
            if key in mapping:
                raise self._refusal(line, format_path((*path, key)), "is given twice; expected once")
            self._lines[*path, key] = line
            mapping[key] = self._value(value_node, (*path, key))
        return mapping
