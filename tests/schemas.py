"""Fifty schemas whose answers are finite: every string, list and number in them has bounds."""

from typing import Any

Schema = dict[str, Any]


def object_of(*, required: list[str] | None = None, **properties: Any) -> Schema:
    """An object with these properties and no others; all are required unless `required` says."""
    names = list(properties) if required is None else required
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }


def text(most: int = 12) -> Schema:
    return {"type": "string", "maxLength": most}


def number(least: int = 0, most: int = 99) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def list_of(items: Any, most: int = 3, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


POINT = object_of(x=number(-5, 5), y=number(-5, 5))
TREE = {
    "$defs": {"node": object_of(v=number(), kids=list_of({"$ref": "#/$defs/leaf"}, 2))},
    "$ref": "#/$defs/node",
}
TREE["$defs"]["leaf"] = object_of(v=number(0, 9))
CIRCLE = object_of(kind={"const": "circle"}, radius=number(1, 9))
SQUARE = object_of(kind={"const": "square"}, side=number(1, 9))

SCHEMAS: list[Schema] = [
    # Objects
    object_of(animal={"enum": ["penguin", "panda", "cat"]}, count=number(0, 20)),
    object_of(name=text(), age=number()),
    object_of(a={"type": "boolean"}, b={"type": "null"}),
    object_of(required=["a"], a=number(), b=text(4), c={"type": "boolean"}),
    object_of(required=[], a=number(), b=number(), c=number()),
    object_of(required=["c"], a=number(), b=number(), c=number()),
    object_of(z=number(0, 9), a=number(0, 9), m=number(0, 9)),
    object_of(outer=object_of(middle=object_of(inner=text(5)))),
    object_of(start=POINT, end=POINT),
    object_of(title=text(), tags=list_of(text(6)), box=list_of(number(0, 640), 4, 4)),
    {**object_of(a={}, b={}), "properties": {"a": number(), "b": text(3)}, "minProperties": 1},
    {
        "type": "object",
        "properties": {"n": number()},
        "required": ["n"],
        "patternProperties": {"^extra$": {"type": "null"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {
        "type": "object",
        "patternProperties": {"^k[0-9]$": number(0, 9)},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {"properties": {"a": number()}, "required": ["a"], "type": "object", "maxProperties": 1},
    # Arrays
    list_of(number()),
    list_of(number(0, 9), 5, 5),
    list_of({"type": "boolean"}, 4, 1),
    list_of(list_of(number(0, 9), 2), 2),
    list_of(POINT, 2, 1),
    {"type": "array", "prefixItems": [number(), text(4)], "items": False},
    {"type": "array", "prefixItems": [number()], "items": {"type": "null"}, "maxItems": 3},
    list_of({"enum": ["a", "b", 1, None]}, 4),
    list_of(object_of(required=["label"], label=text(8), score=number(0, 9)), 2),
    # Enums and constants
    {"enum": ["yes", "no"]},
    {"enum": [1, 2.5, "three", None, True, [4], {"five": 6}]},
    {"const": {"b": [1, {"c": "d"}], "a": None}},
    {"const": 'quotes " and \\ and /'},
    {"type": "string", "enum": ["a", "bb", "ccc"], "minLength": 2},
    {"enum": [f"label {i}" for i in range(300)]},
    # Numbers
    number(-7, 123),
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    {"type": "integer", "multipleOf": 7, "minimum": 3, "maximum": 50},
    object_of(score={"type": "number", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    {"enum": [0.1, 0.25, 1e-3, -17]},
    {"type": ["integer", "null"], "minimum": 1, "maximum": 3},
    # Unicode
    {"enum": ["Pinguin", "pingüino", "企鹅", "🐧", "пингвин"]},
    object_of(**{"größe": {"enum": ["groß", "klein"]}, "数": number(0, 9), "🐼": {"const": "🎋"}}),
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[ä-ü🐧]{1,3}$"},
    # Texts
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "pattern": "b", "maxLength": 8},
    {"type": "string", "format": "date"},
    object_of(at={"type": "string", "format": "time", "maxLength": 9}),
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    # Combinations and references
    {"anyOf": [number(), text(5), {"type": "null"}]},
    {"oneOf": [CIRCLE, SQUARE]},
    {"allOf": [{"type": "object", "required": ["a"]}, object_of(a=number(), b=text(3))]},
    TREE,
    {
        "$defs": {"size": number(1, 9)},
        **object_of(w={"$ref": "#/$defs/size"}, h={"$ref": "#/$defs/size"}),
    },
]
