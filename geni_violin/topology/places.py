"""Values of a YAML file that know where they stand.

Theory of operation. PyYAML's ``compose`` gives nodes with line marks and leaves scalars as they were written, so
an error can always name FILE:LINE and the text. A :class:`Place` wraps one node; its methods take the value as one type
or raise :class:`InvalidInput` in the one form that all topology errors have: ``FILE:LINE: what is wrong; expected …``.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from geni_violin.core.errors import InvalidInput

MAX_FILE_BYTES = 4 << 20
_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "map": "a mapping",
    "seq": "a list",
    "null": "nothing",
    "str": "text",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
}
_DECIMAL = re.compile(r"(0|[1-9]\d*)(\.\d*)?|\.\d+")


@dataclass(frozen=True)
class Place:
    """One value in the file. ``what`` is what people call it, such as "vms[2].address"."""

    path: Path
    node: yaml.Node
    what: str

    def wrong(self, problem: str, expected: str) -> InvalidInput:
        """The error that says what is wrong at this line, and what was expected."""
        return InvalidInput(f"{self.path}:{self.line}: {problem}", f"expected {expected}")

    @property
    def line(self) -> int:
        """The line that the value begins at, counted from 1."""
        return int(self.node.start_mark.line) + 1

    @property
    def _tag(self) -> str:
        return str(self.node.tag).removeprefix(_TAG)

    def _is(self) -> str:
        kind = _KINDS.get(self._tag, self._tag)
        shown = f" ({self.node.value!r})" if isinstance(self.node, yaml.ScalarNode) and self._tag != "null" else ""
        return kind + shown

    def mapping(self, required: Iterable[str], optional: Iterable[str]) -> dict[str, "Place"]:
        """A mapping with all of ``required``, some of ``optional`` and no other key.

        :raise InvalidInput: it is none, or a key is unknown, missing or given twice.
        """
        known = (*required, *optional)
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(f"{self.what} is {self._is()}", f"a mapping with the keys {', '.join(known)}")
        found: dict[str, Place] = {}
        for key_node, value_node in self.node.value:
            key = self._key(key_node, known)
            if key in found:
                raise Place(self.path, key_node, "").wrong(f"{self._of(key)} is given twice", "each key once")
            found[key] = Place(self.path, value_node, self._of(key))
        for key in required:
            if key not in found:
                raise self.wrong(f"{self.what} has no {key!r}", f"the keys {', '.join(required)}")
        return found

    def _of(self, key: str) -> str:
        return key if self.what == "the file" else f"{self.what}.{key}"

    def _key(self, node: yaml.Node, known: tuple[str, ...]) -> str:
        key = str(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
        if key in known:
            return key
        near = difflib.get_close_matches(key, known, n=1)
        guess = f"{near[0]!r} (did you mean that?), or one of " if near else "one of "
        others = ", ".join(name for name in known if name not in near)
        raise Place(self.path, node, key).wrong(f"{self.what} has an unknown key {key!r}", guess + others)

    @property
    def is_mapping(self) -> bool:
        """Whether it is a mapping."""
        return isinstance(self.node, yaml.MappingNode)

    def items(self, expected: str) -> list["Place"]:
        """The items of a list.

        :raise InvalidInput: it is none.
        """
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong(f"{self.what} is {self._is()}", expected)
        return [Place(self.path, node, f"{self.what}[{number}]") for number, node in enumerate(self.node.value, 1)]

    def text(self, expected: str) -> str:
        """A scalar that YAML takes for text.

        :raise InvalidInput: it is something else, or empty.
        """
        if not isinstance(self.node, yaml.ScalarNode) or self._tag != "str" or not self.node.value:
            raise self.wrong(f"{self.what} is {self._is()}", expected)
        return str(self.node.value)

    def word(self, expected: str) -> str:
        """A scalar as it was written, whatever YAML takes it for (an unquoted MAC may look like a number to it).

        :raise InvalidInput: it is a mapping, a list or nothing.
        """
        if not isinstance(self.node, yaml.ScalarNode) or self._tag == "null" or not self.node.value:
            raise self.wrong(f"{self.what} is {self._is()}", expected)
        return str(self.node.value)

    def known_name(self, kind: str, known: Iterable[str]) -> str:
        """A name that the file has given to something; ``kind`` is what people call such a thing.

        :raise InvalidInput: it is another.
        """
        text = self.word(f"the name of a {kind}")
        if text not in known:
            raise self.wrong(f"{self.what} names an unknown {kind} {text!r}", f"one of {', '.join(sorted(known))}")
        return text

    def truth(self) -> bool:
        """True or false.

        :raise InvalidInput: it is something else.
        """
        if not isinstance(self.node, yaml.ScalarNode) or self._tag != "bool":
            raise self.wrong(f"{self.what} is {self._is()}", "true or false")
        return bool(yaml.SafeLoader.bool_values[self.node.value.lower()])

    def number(self, low: float, high: float, unit: str) -> float:
        """A number in decimal notation from ``low`` to ``high``.

        :raise InvalidInput: it is something else.
        """
        expected = f"{unit} from {low:g} to {high:g}"
        text = self.node.value if isinstance(self.node, yaml.ScalarNode) and self._tag in ("int", "float") else ""
        if not _DECIMAL.fullmatch(text):
            raise self.wrong(f"{self.what} is {self._is()}", expected)
        if not low <= float(text) <= high:
            raise self.wrong(f"{self.what} is {text}", expected)
        return float(text)

    def integer(self, low: int, high: int, unit: str) -> int:
        """A whole number from ``low`` to ``high``.

        :raise InvalidInput: it is something else.
        """
        expected = f"a whole number of {unit} from {low} to {high}"
        text = self.node.value if isinstance(self.node, yaml.ScalarNode) and self._tag == "int" else ""
        if not text.isdecimal() or (text.startswith("0") and text != "0"):
            raise self.wrong(f"{self.what} is {self._is()}", expected)
        if not low <= int(text) <= high:
            raise self.wrong(f"{self.what} is {text}", expected)
        return int(text)


def read_document(path: Path) -> Place:
    """The one YAML document of a file.

    :raise InvalidInput: the file cannot be read, is empty or is not YAML.
    """
    text = _read(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise InvalidInput(f"{path}:{line}: not YAML: {problem}", "expected a topology file in YAML") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"{path}:1: not YAML: {reason}", "expected a topology file in YAML") from error
    if node is None:
        raise InvalidInput(f"{path}:1: the file is empty", "expected a topology with the keys name, image and vms")
    return Place(path, node, "the file")


def _read(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInput(f"{path}: the file is too large", f"expected at most {MAX_FILE_BYTES} bytes of YAML")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInput(f"{path}: cannot be read: {reason}", "expected a topology file in YAML") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InvalidInput(f"{path}:{line}: a byte that is not UTF-8", "expected a text file in UTF-8") from error
