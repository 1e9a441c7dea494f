"""JSON schemas as people give them → the text of one in which nothing is silently ignored.

Annotations are dropped, and what llguidance can't enforce is refused by its name: it skips keywords
that it doesn't know, and a few that it does know it reads differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import combinations
from math import lcm
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..checks import brief, is_number, reason, shown

MAX_BYTES = 2**16
MAX_DEPTH = 64
EXACT = 2**53  # llguidance reads numbers as float64
MAX_MULTIPLE = 10_000  # it makes a state for each remainder

ANY = {"json": {}, "json_object": {"type": "object"}}
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ONE_SCHEMA = ("items", "additionalProperties")
SCHEMAS = ("anyOf", "allOf", "oneOf", "prefixItems")
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# llguidance drops them where \u0061 is no way to write an a.
UNWRITTEN = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
# These say nothing about what is valid.
ANNOTATIONS = {"$schema", "$comment", "title", "description", "default", "examples", "example"}
ANNOTATIONS |= {"deprecated", "readOnly", "writeOnly", "discriminator"}

_YEAR = r"[0-9]{4}"
_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    rf"|{_LEAP_YEAR}-02-29)"
)
_HOUR_AND_MINUTE = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_AND_MINUTE}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{_HOUR_AND_MINUTE})"
# llguidance would let days through that are in no calendar.
PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def read_schema(source: Any) -> str:
    """The text of a schema that llguidance enforces as a whole; of its own results, the same.

    Args:
        source: a JSON schema as a dict, its text, or the path of a file with it; a pydantic model
            class; "json" for any JSON, or "json_object" for any object.

    Raises:
        ValueError: it is no JSON schema, too large or too deep, or uses what can't be enforced.
        FileNotFoundError: no such file.
    """
    schema = _find(source)
    if schema is True:
        schema = ANY["json"]
    if not isinstance(schema, Mapping):
        raise ValueError(f"A JSON schema must be an object, found {shown(schema)}.")
    try:
        text = json.dumps(_Reader(schema).read(schema), ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("The schema has a text with half of a surrogate pair.") from None
    _check_size(size)
    return text


def _find(source: Any) -> Any:
    """The schema that someone gives in one of many ways."""
    if hasattr(source, "model_json_schema"):
        try:
            return source.model_json_schema()
        except Exception as error:  # pydantic's own are of many types
            raise ValueError(f"{shown(source)} has no JSON schema ({reason(error)}).") from None
    if not isinstance(source, (str, Path)):
        return source
    if isinstance(source, str) and source in ANY:
        return ANY[source]
    if isinstance(source, str) and source.strip().startswith(("{", "[", "true", "false")):
        _check_size(len(source))
        return _parse(source, "The schema")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {brief(str(source))} with a schema; give its text, a path, "
            f"{' or '.join(ANY)}."
        )
    _check_size(path.stat().st_size)
    return _parse(path.read_bytes(), brief(str(path)))


def _parse(text: str | bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({reason(error)}).") from None


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"The schema has {size} bytes; at most {MAX_BYTES} are allowed.")


class _Reader:
    """Copies a schema, checking each keyword."""

    def __init__(self, root: Any):
        self.root = root
        self.multiple = 1  # the least common one of all `multipleOf`

    def read(self, schema: Any, *place: str) -> Any:
        """A schema without annotations.

        Args:
            schema: what stands at `place`.
            place: the keys that lead to it.
        """
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            self.reject(place, f"must be a schema, found {shown(schema)}")
        self.check_depth(place)
        found: dict[str, Any] = {}
        for name, value in schema.items():
            if name in ANNOTATIONS or str(name).startswith("x-") or (name, value) in IDLE:
                continue
            if name == "$id" and not place:
                continue
            found[name] = self.value(name, value, (*place, str(name)))
        self.read_format(found, place)
        self.read_one_of(found)
        return found

    def value(self, name: str, value: Any, place: tuple[str, ...]) -> Any:
        """What a keyword says, checked."""
        if name in ONE_SCHEMA:
            return self.read(value, *place)
        if name in SCHEMAS:
            self.expect(isinstance(value, (list, tuple)), place, "a list of schemas", value)
            return [self.read(one, *place, str(i)) for i, one in enumerate(value)]
        if name in NAMED_SCHEMAS:
            self.expect(isinstance(value, Mapping), place, "an object with schemas", value)
            return {str(key): self.read(one, *place, str(key)) for key, one in value.items()}
        if name not in READERS:
            self.reject(place, "is not supported, so that it can't be enforced; leave it out")
        READERS[name](self, place, value)
        return int(value) if name in (*COUNTS, "multipleOf") else value

    def read_format(self, found: dict[str, Any], place: tuple[str, ...]) -> None:
        """Write formats that llguidance takes loosely as patterns."""
        pattern = PATTERNS.get(found.get("format", ""))
        if pattern is None:
            return
        del found["format"]
        if "pattern" in found:
            found["allOf"] = [*found.get("allOf", ()), {"pattern": pattern}]
        else:
            found["pattern"] = pattern

    def read_one_of(self, found: dict[str, Any]) -> None:
        """Write `oneOf` as `anyOf` where no value fits two of its schemas."""
        if "oneOf" not in found or "anyOf" in found:
            return
        resolved = [self.resolve(one) for one in found["oneOf"]]
        if all(are_disjoint(one, other) for one, other in combinations(resolved, 2)):
            # In the place of the other: the order of keywords is that of properties.
            items = [("anyOf" if name == "oneOf" else name, v) for name, v in found.items()]
            found.clear()
            found.update(items)

    def resolve(self, schema: Any) -> Any:
        """The schema that a reference leads to."""
        seen: list[str] = []
        while isinstance(schema, Mapping) and set(schema) - ANNOTATIONS == {"$ref"}:
            if schema["$ref"] in seen:
                return True
            seen.append(schema["$ref"])
            schema = self.target(schema["$ref"])
        return schema

    def target(self, reference: str) -> Any:
        """What stands at a JSON pointer; None if nothing does."""
        schema = self.root
        for part in reference[1:].split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(schema, Mapping):
                schema = schema.get(key)
            elif isinstance(schema, (list, tuple)) and key.isdecimal() and int(key) < len(schema):
                schema = schema[int(key)]
            else:
                return None
        return schema

    def check_depth(self, place: tuple[str, ...]) -> None:
        if len(place) > MAX_DEPTH:
            raise ValueError(f"The schema is deeper than {MAX_DEPTH} levels.")

    def expect(self, fits: bool, place: tuple[str, ...], wanted: str, value: Any) -> None:
        if not fits:
            self.reject(place, f"must be {wanted}, found {shown(value)}")

    def reject(self, place: tuple[str, ...], problem: str) -> None:
        *above, name = place or ("schema",)
        where = f" (at {brief('/'.join(above), 80)})" if above else ""
        raise ValueError(f"The schema's {shown(name)}{where} {problem}.")

    def check_type(self, place: tuple[str, ...], value: Any) -> None:
        names = value if isinstance(value, (list, tuple)) else [value]
        fits = bool(names) and all(name in TYPES for name in names)
        self.expect(fits, place, f"one of {', '.join(TYPES)}, or a list of them", value)

    def check_count(self, place: tuple[str, ...], value: Any) -> None:
        whole = is_number(value) and value == int(value) >= 0
        self.expect(whole, place, "a whole number from 0", value)
        if place[-1] == "minProperties" and value > 1:
            self.reject(place, "is supported only up to 1, since keys may come twice")

    def check_bound(self, place: tuple[str, ...], value: Any) -> None:
        fits = is_number(value) and abs(value) <= EXACT
        self.expect(fits, place, "a number of at most 2⁵³", value)

    def check_multiple(self, place: tuple[str, ...], value: Any) -> None:
        whole = is_number(value) and value == int(value) >= 1
        self.expect(whole, place, "a whole number from 1, since no other is exact", value)
        self.multiple = lcm(self.multiple, int(value))
        if self.multiple > MAX_MULTIPLE:
            self.reject(place, f"is too large: at most {MAX_MULTIPLE}, all of them together")

    def check_text(self, place: tuple[str, ...], value: Any) -> None:
        self.expect(isinstance(value, str), place, "a text", value)

    def check_reference(self, place: tuple[str, ...], value: Any) -> None:
        within = isinstance(value, str) and (value == "#" or value.startswith("#/"))
        self.expect(within, place, "a path within the schema, as in #/$defs/name", value)
        if self.target(value) is None:
            self.reject(place, f"leads nowhere: {shown(value)}")

    def check_format(self, place: tuple[str, ...], value: Any) -> None:
        known = (*PATTERNS, *FORMATS)
        fits = isinstance(value, str) and value in known
        self.expect(fits, place, f"one of {', '.join(known)}", value)

    def check_required(self, place: tuple[str, ...], value: Any) -> None:
        fits = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        self.expect(fits, place, "a list of texts", value)

    def check_enum(self, place: tuple[str, ...], value: Any) -> None:
        fits = isinstance(value, (list, tuple)) and len(value) > 0
        self.expect(fits, place, "a list that is not empty", value)
        for one in value:
            self.check_constant(place, one)

    def check_constant(self, place: tuple[str, ...], value: Any, *path: str) -> None:
        self.check_depth((*place, *path))
        if isinstance(value, Mapping):
            for key, part in value.items():
                self.check_constant(place, part, *path, str(key))
        elif isinstance(value, (list, tuple)):
            for part in value:
                self.check_constant(place, part, *path, "")
        elif isinstance(value, str):
            self.expect(not UNWRITTEN.search(value), place, "without control characters", value)
        elif not isinstance(value, bool) and value is not None:
            fits = is_number(value) and abs(value) <= EXACT
            self.expect(fits, place, "of texts and numbers of at most 2⁵³", value)


IDLE = (("uniqueItems", False),)  # that ask for nothing
READERS = {
    "type": _Reader.check_type,
    "const": _Reader.check_constant,
    "enum": _Reader.check_enum,
    "required": _Reader.check_required,
    "pattern": _Reader.check_text,
    "format": _Reader.check_format,
    "$ref": _Reader.check_reference,
    "multipleOf": _Reader.check_multiple,
    **dict.fromkeys(COUNTS, _Reader.check_count),
    **dict.fromkeys(BOUNDS, _Reader.check_bound),
}


def are_disjoint(one: Any, other: Any) -> bool:
    """Whether it is plain to see that no value fits both schemas."""
    if one is False or other is False:
        return True
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    if not types_of(one) & types_of(other):
        return True
    tags = constants_of(one), constants_of(other)
    if None not in tags:
        return not set(tags[0] or ()) & set(tags[1] or ())
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    if types_of(one) != {"object"} or types_of(other) != {"object"}:
        return False
    return any(
        are_disjoint(one.get("properties", {}).get(key), other.get("properties", {}).get(key))
        for key in shared
    )


def types_of(schema: Mapping[str, Any]) -> set[str]:
    """The types of JSON that a schema may allow, integers among the numbers."""
    names = schema.get("type", TYPES)
    names = [names] if isinstance(names, str) else names
    return {"number" if name == "integer" else name for name in names}


def constants_of(schema: Mapping[str, Any]) -> set[str] | None:
    """The values that a schema names, as JSON; None if it names none."""
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else []
    return {json.dumps(value, sort_keys=True) for value in values} or None
