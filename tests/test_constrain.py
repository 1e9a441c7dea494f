"""Answers that follow a JSON schema, a regular expression or a list of choices."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from command import Run
from models import PANDA, PENGUINS, Nano
from schemas import SCHEMAS, object_of

import fastvlm_mlx as fv
from fastvlm_mlx.generation import constrain
from fastvlm_mlx.generation.batch import BatchError, stream_batch
from fastvlm_mlx.generation.constrain import (
    IncompleteAnswer,
    constrain_logits,
    make_constraint,
    mask_logits,
)
from fastvlm_mlx.generation.json_schema import MAX_BYTES, read_schema
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.generation.requests import RequestError
from fastvlm_mlx.generation.sampling import make_sampler
from fastvlm_mlx.generation.scheduler import Batch

pytestmark = pytest.mark.needs("llguidance")
ASK = "How many penguins are there?"
COUNT = object_of(
    animal={"enum": ["penguin", "panda"]}, count={"type": "integer", "minimum": 0, "maximum": 20}
)
COUNTED = '{"animal": "penguin", "count": 6}'
HOT: dict[str, Any] = {"temperature": 1.5, "max_tokens": 500}


def assert_valid(text: str, schema: Any) -> None:
    """Check an answer with a library that knows nothing of grammars."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))


def texts_of(nano: Nano, requests: list[dict[str, Any]], image: Any = None) -> list[str]:
    """The answers of one batch to requests that differ in their options; all must end."""
    batch = Batch(*nano, max_batch=32)
    ids = [batch.insert(ASK, image, **options) for options in requests]
    texts = dict.fromkeys(ids, "")
    while batch:
        for id, response in batch.step():
            texts[id] += response.text
            assert response.finish_reason in (None, "stop")
    return [texts[id] for id in ids]


def check_all_schemas(nano: Nano, seeds: range) -> None:
    """Answers of nano when it is all but random, to every schema with every seed."""
    asked = [(schema, seed) for schema in SCHEMAS for seed in seeds]
    found = texts_of(nano, [{"schema": schema, "seed": seed} | HOT for schema, seed in asked])
    for text, (schema, _) in zip(found, asked, strict=True):
        assert_valid(text, schema)


@pytest.fixture
def bytes_allowed(nano: Nano) -> Callable[..., bool]:
    """Whether a text, given byte by byte, may be the whole answer."""
    model, processor = nano
    alphabet = {
        processor.tokenizer.token_bytes(i): i for i in range(processor.tokenizer.vocab_size)
    }

    def allowed(text: str, **options: Any) -> bool:
        constraint = make_constraint(processor, model.config.text.vocab_size, Options(**options))
        assert constraint is not None
        end = next(iter(processor.tokenizer.eos_token_ids))
        tokens = [*(alphabet[bytes([byte])] for byte in text.encode()), end]
        try:
            for token in tokens:
                constraint.accept(token)
        except ValueError:
            return False
        return constraint.complete

    return allowed


def bits_of(masks: np.ndarray) -> np.ndarray:
    return np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")


# Schemas


def test_there_are_fifty_schemas() -> None:
    assert len({json.dumps(schema) for schema in SCHEMAS}) == 50


@pytest.mark.needs("jsonschema")
def test_answers_are_valid_against_their_schemas(nano: Nano) -> None:
    check_all_schemas(nano, range(2))


@pytest.mark.slow
@pytest.mark.needs("jsonschema")
def test_a_thousand_answers_are_valid_against_their_schemas(nano: Nano) -> None:
    check_all_schemas(nano, range(100, 120))


def test_the_answer_is_still_the_models(nano: Nano) -> None:
    assert fv.generate(*nano, ASK, PENGUINS, schema=COUNT) == COUNTED


@pytest.mark.parametrize("form", ["dict", "text", "path", "str path"])
def test_a_schema_may_be_given_in_many_ways(form: str, nano: Nano, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(COUNT, indent=2), encoding="utf-8")
    given = {"dict": COUNT, "text": f" {json.dumps(COUNT)}", "path": file, "str path": str(file)}
    assert fv.generate(*nano, ASK, PENGUINS, schema=given[form]) == COUNTED


@pytest.mark.needs("pydantic")
def test_a_schema_may_be_a_pydantic_model(nano: Nano) -> None:
    from typing import Annotated, Literal

    from pydantic import BaseModel, ConfigDict, Field

    class Closed(BaseModel):
        model_config = ConfigDict(extra="forbid")

    class Cat(Closed):
        kind: Literal["cat"]
        lives: Annotated[int, Field(ge=1, le=9, description="of nine")]

    class Bird(Closed):
        kind: Literal["bird"]
        flies: bool | None

    class Found(Closed):
        """What is seen."""

        animal: Annotated[Cat | Bird, Field(discriminator="kind")]
        name: Annotated[str, Field(max_length=5)] = "Tux"

    for seed in range(4):
        found = Found.model_validate_json(fv.generate(*nano, ASK, schema=Found, seed=seed, **HOT))
        assert isinstance(found.animal, (Cat, Bird))

    class Odd(BaseModel):
        call: Callable[[int], int]

    with pytest.raises(ValueError, match="Odd'> has no JSON schema"):
        Options(schema=Odd)


def test_properties_come_in_the_schemas_order(nano: Nano) -> None:
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    orders = [list("zam"), list("amz"), list("mza")]
    requests = [{"schema": object_of(**dict.fromkeys(order, digit))} for order in orders]
    assert [list(json.loads(text)) for text in texts_of(nano, requests)] == orders


def test_any_json(bytes_allowed: Callable[..., bool]) -> None:
    for text in ("{}", '{"a":[1,-2.5e3,{"b":null}], "c": "d"}', "[]", "3", '"x"', "true"):
        assert json.loads(text) is not NotImplemented
        assert bytes_allowed(text, schema="json")
        assert bytes_allowed(text, schema="json_object") == text.startswith("{")
    for text in ("", "{", "[1,]", "{'a':1}", "01", '"a', "Here: {}", "nul", '"\\ud800"', '"\n"'):
        assert not bytes_allowed(text, schema="json")


def test_there_are_no_blanks_to_go_on_with(bytes_allowed: Callable[..., bool]) -> None:
    for text in ('{"a":1,"b":[1,2]}', '{"a": 1, "b": [1, 2]}'):
        assert bytes_allowed(text, schema="json_object")
    blanks = (" {}", "{ }", "{} ", "{}\n", '{"a":  1}', '{"a" :1}', '{"a":1 ,"b":2}', "[1,\n2]")
    assert not any(bytes_allowed(text, schema="json") for text in blanks)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        # A property's name can't be spelled in another way, past what is asked of it.
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": True},
            ['{"a":1}', '{"b":2}'],
            ['{"a":2}', '{"\\u0061":2}', '{"b":2,"a":2}', '{"a":1,"a":2}'],
        ),
        ({"const": "\n\t/ü"}, ['"\\n\\t/ü"'], ['"n"', '"\\n\\t\\/ü"']),
        ({"type": "string", "minLength": 2}, ['"ab"', '"🐧🐼"', '"\\n\\""'], ['"🐧"', '"\\n"']),
        ({"type": "string", "maxLength": 1}, ['"🐧"', '""'], ['"ab"']),
        ({"type": "string", "pattern": "^a.$"}, ['"ab"'], ['"a"', '"xab"', '"a\\n"']),
        ({"type": "string", "pattern": "b"}, ['"b"', '"abc"'], ['"ac"']),
        (
            {"type": "string", "pattern": "^19", "format": "date"},
            ['"1999-01-01"'],
            ['"19"', '"2024-02-29"'],
        ),
        (
            {"format": "date", "type": "string"},
            ['"2024-02-29"', '"2000-02-29"', '"2023-12-31"'],
            ['"2023-02-29"', '"1900-02-29"', '"2023-04-31"', '"2023-13-01"', '"2024-2-9"'],
        ),
        ({"format": "time", "type": "string"}, ['"23:59:59Z"'], ['"24:00:00Z"', '"12:00:60Z"']),
        (
            {"format": "date-time", "type": "string"},
            ['"2024-02-29T01:02:03.5+01:00"'],
            ['"2023-02-29T01:02:03Z"', '"2024-02-29 01:02:03Z"', '"2024-02-29T01:02:03"'],
        ),
        ({"type": "integer", "multipleOf": 12}, ["24", "0", "-36"], ["6", "25"]),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["true"]),
        ({"$ref": "#/$defs/a%25~1b", "$defs": {"a%/b": {"const": 3}}}, ["3"], ["4"]),
        ({"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}, ["3", "5"], ["2", "6"]),
        ({"const": 1.0}, ["1"], ["2"]),
        (True, ["1"], [""]),
    ],
)
def test_what_a_schema_lets_through(
    schema: Any, right: list[str], wrong: list[str], bytes_allowed: Callable[..., bool]
) -> None:
    assert [text for text in right if not bytes_allowed(text, schema=schema)] == []
    assert [text for text in wrong if bytes_allowed(text, schema=schema)] == []


def nested(depth: int) -> Any:
    return {"items": nested(depth - 1)} if depth else {}


LEFT_OUT = (
    "not if then else contains minContains maxContains uniqueItems propertyNames dependentRequired "
    "dependentSchemas unevaluatedProperties unevaluatedItems additionalItems $anchor $dynamicRef "
    "$recursiveRef contentEncoding contentMediaType nullable divisibleBy extends disallow maxlength"
)


@pytest.mark.parametrize("keyword", LEFT_OUT.split())
def test_keywords_that_can_not_be_enforced_are_refused_by_name(keyword: str) -> None:
    schema = {"type": "object", "properties": {"tags": {keyword: {}}}}
    with pytest.raises(ValueError) as caught:
        Options(schema=schema)
    assert str(caught.value) == (
        f"The schema's '{keyword}' (at properties/tags) is not supported, so that it can't be "
        "enforced; leave it out."
    )


def test_annotations_are_no_matter() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/a",
        "title": "A",
        "description": "b",
        "default": 3,
        "examples": [4],
        "deprecated": True,
        "x-own": {"not": {}},
        "uniqueItems": False,
        "type": "integer",
    }
    assert read_schema(schema) == '{"type": "integer"}'
    named = {"type": "object", "properties": {"title": {"title": "T", "type": "null"}}}
    expected = {"type": "object", "properties": {"title": {"type": "null"}}}
    assert json.loads(read_schema(named)) == expected
    for one in SCHEMAS:
        assert read_schema(read_schema(one)) == read_schema(one)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ([], r"A JSON schema must be an object, found \[\]"),
        (3, "A JSON schema must be an object, found 3"),
        ("{", "The schema is not valid JSON"),
        ('{"const": NaN}', "numbers of at most 2⁵³, found nan"),
        ({"type": "text"}, "'type' must be one of null, boolean, .*, found 'text'"),
        ({"type": []}, "'type' must be one of"),
        ({"properties": {"a": 3}}, r"'a' \(at properties\) must be a schema, found 3"),
        ({"properties": []}, "'properties' must be an object with schemas"),
        ({"anyOf": {}}, "'anyOf' must be a list of schemas"),
        ({"items": [{}]}, r"'items' must be a schema, found \[\{\}\]"),
        ({"required": True}, "'required' must be a list of texts"),
        ({"enum": []}, "'enum' must be a list that is not empty"),
        ({"enum": ["a", 2**60]}, "'enum' must be of texts and numbers of at most 2⁵³"),
        ({"const": {"a": ["\x01"]}}, "'const' must be without control characters"),
        ({"minLength": -1}, "'minLength' must be a whole number from 0, found -1"),
        ({"maxItems": 1.5}, "'maxItems' must be a whole number from 0, found 1.5"),
        ({"minimum": "3"}, "'minimum' must be a number of at most 2⁵³, found '3'"),
        ({"exclusiveMinimum": True}, "'exclusiveMinimum' must be a number"),
        ({"minProperties": 2}, "'minProperties' is supported only up to 1"),
        (
            {"multipleOf": 0.1},
            "'multipleOf' must be a whole number from 1, since no other is exact",
        ),
        ({"multipleOf": 10_007}, "'multipleOf' is too large: at most 10000"),
        ({"allOf": [{"multipleOf": 101}, {"multipleOf": 103}]}, "all of them together"),
        ({"pattern": 3}, "'pattern' must be a text"),
        ({"format": "int32"}, "'format' must be one of date, .*, uri, found 'int32'"),
        ({"format": ["date"]}, "'format' must be one of"),
        ({"$ref": "https://example.com/a"}, "'\\$ref' must be a path within the schema"),
        ({"$ref": "#/$defs/a"}, "'\\$ref' leads nowhere: '#/\\$defs/a'"),
        ({"properties": {"a": {"$id": "b"}}}, r"'\$id' \(at properties/a\) is not supported"),
        ({"const": "\ud800"}, "half of a surrogate pair"),
        (nested(100), "deeper than 64 levels"),
        ({"enum": ["x" * MAX_BYTES]}, f"bytes; at most {MAX_BYTES} are allowed"),
        ("{" + " " * MAX_BYTES, f"bytes; at most {MAX_BYTES} are allowed"),
    ],
)
def test_wrong_schemas_are_said_in_a_sentence(schema: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Options(schema=schema)
    message = str(caught.value)
    assert len(message) < 400 and message.endswith(".") and "\n" not in message


HOSTILE: dict[str, dict[str, Any]] = {
    "repeats of repeats": {"regex": "((a|b|c){1,500}x){1,500}"},
    "more states than atoms": {"regex": "(.*a.{20}){3}"},
    "letters of all scripts": {"regex": r"(\p{L}{1,200}\s){1,200}"},
    "many choices": {"choices": [f"choice {i} of many" for i in range(20_000)]},
    "patterns that must all fit": {
        "schema": {"allOf": [{"pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(2, 14)]}
    },
    "vast arrays": {"schema": {"type": "array", "maxItems": 10**5, "items": {"maxLength": 10**5}}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_grammar_is_ready_or_refused_soon(kind: str, nano: Nano) -> None:
    """A second on its own; the rest is for what runs beside the tests."""
    start = time.perf_counter()
    try:
        options = Options(**HOSTILE[kind])
        make_constraint(nano[1], nano[0].config.text.vocab_size, options)
    except ValueError as error:
        assert str(error).endswith(".") and len(str(error)) < 500
    assert time.perf_counter() - start < 5


def test_a_schema_that_holds_itself_is_too_deep() -> None:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    constant: list[Any] = []
    constant.append(constant)
    for one in (schema, {"const": constant}):
        with pytest.raises(ValueError, match="deeper than 64 levels"):
            Options(schema=one)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "schema can't be used"),
        (
            {"schema": {"items": False, "minItems": 1, "type": "array"}},
            "schema can't be used: Unsat",
        ),
        ({"schema": {"$ref": "#"}}, "schema can't be used: no answer fits it."),
        ({"schema": {"type": "string", "pattern": "(?=a)"}}, "look-behind, is not supported."),
        ({"schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "write anyOf."),
        ({"schema": {"type": "string", "pattern": "^("}}, "schema can't be used: unclosed group."),
        ({"regex": "("}, "regex can't be used: unclosed group."),
        ({"regex": r"(a)\1"}, "regex can't be used: backreferences are not supported."),
        ({"regex": "[a&&b]"}, "regex can't be used: no answer fits it."),
        ({"regex": "(?-u:\\xff)"}, "regex can't be used: pattern can match invalid UTF-8."),
    ],
)
def test_what_can_not_be_used_is_said_before_anything_is_read(
    options: Any, said: str, nano: Nano
) -> None:
    with pytest.raises(ValueError) as caught:
        fv.stream_generate(*nano, ASK, "no such image.png", **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# Regular expressions and choices


@pytest.mark.parametrize("regex", [r"[a-z]{3,8} [0-9]{2}", "(yes|no), because .{5,20}", "[🐧🐼]+!"])
def test_answers_match_a_regular_expression(regex: str, nano: Nano) -> None:
    requests = [{"regex": regex, "seed": seed} | HOT for seed in range(5)]
    for text in texts_of(nano, requests):
        assert re.fullmatch(regex, text)


def test_anchors_of_a_regular_expression_are_its_ends(bytes_allowed: Callable[..., bool]) -> None:
    assert bytes_allowed("abc", regex="^abc$") and not bytes_allowed("abcd", regex="^abc$")


def test_answers_are_among_the_choices(nano: Nano) -> None:
    choices = ["yes", "yes, please", 'ein "Zitat"', "🐧", "no\nand no"]
    requests = [{"choices": choices, "seed": seed} | HOT for seed in range(30)]
    assert set(texts_of(nano, requests)) <= {*choices}
    assert fv.generate(*nano, "What is this?", PANDA, choices=["a cat", "a panda"]) == "a panda"
    for choice in choices:
        assert fv.generate(*nano, ASK, choices=[choice]) == choice


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"choices": []}, "choices must be a list of texts that are not empty"),
        ({"choices": "yes"}, "choices must be a list of texts that are not empty"),
        ({"choices": ["a", ""]}, "choices must be a list of texts that are not empty"),
        ({"choices": ["\ud800"]}, "choices must be texts without surrogates"),
        ({"choices": [1]}, "choices must be a list of texts"),
        ({"choices": ["x" * 2**20, "y"]}, "choices has 1048577 bytes; at most"),
        ({"regex": ""}, "regex must be a text that is not empty"),
        ({"regex": 3}, "regex must be a text that is not empty"),
        ({"regex": "\ud800"}, "regex must be a text that is not empty"),
        ({"regex": "a" * 2**17}, "regex has 131072 bytes; at most"),
        ({"regex": "a", "choices": ["a"]}, "Give regex or choices, not both"),
        ({"schema": {}, "choices": ["a"]}, "Give schema or choices, not both"),
        ({"schema": {}, "regex": "a"}, "Give schema or regex, not both"),
        ({"schema": {}, "stop": ["a"]}, "Give schema or stop, not both"),
        ({"choices": ["a"], "stop": "a"}, "Give choices or stop, not both"),
        ({"regex": "a", "num_beams": 2}, "regex does not go with beam search"),
    ],
)
def test_options_that_make_no_constraint(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(**options)


def test_no_stop_texts_are_no_matter() -> None:
    for nothing in ((), []):
        assert Options(choices=["a"], stop=nothing).choices == ("a",)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file .*/none.json with a schema;"):
        Options(schema=tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{'a'")
    with pytest.raises(ValueError, match=r"broken\.json is not valid JSON"):
        Options(schema=str(broken))


# Ways of answering


def test_streams_give_the_same_text_piece_by_piece(nano: Nano) -> None:
    responses = list(fv.stream_generate(*nano, ASK, PENGUINS, schema=COUNT))
    assert "".join(r.text for r in responses) == COUNTED
    assert len([r for r in responses if r.text]) > 5
    assert [r.finish_reason for r in responses[-2:]] == [None, "stop"]


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": 5}])
def test_an_answer_that_is_cut_off_is_an_error(options: Any, nano: Nano) -> None:
    cut = {"schema": COUNT, "max_tokens": 4} | options
    with pytest.raises(
        IncompleteAnswer, match=r"cut off after 4 tokens, .*; raise max_tokens"
    ) as e:
        fv.generate(*nano, ASK, PENGUINS, **cut)
    assert COUNTED.startswith(e.value.text) and isinstance(e.value, ValueError)
    responses = list(fv.stream_generate(*nano, ASK, PENGUINS, **cut))
    assert "".join(r.text for r in responses) == e.value.text
    assert responses[-1].finish_reason == "length"


def test_a_limit_that_cuts_nothing_off_is_no_error(nano: Nano) -> None:
    tokens = len(nano[1].tokenizer.encode("yes"))
    for options in ({}, {"prompt_lookup": 3}):
        asked = {"choices": ["yes"], "max_tokens": tokens} | options
        assert fv.generate(*nano, ASK, **asked) == "yes"
        assert [*fv.stream_generate(*nano, ASK, **asked)][-1].finish_reason == "stop"
    assert fv.batch_generate(*nano, [(ASK, None)], choices=["yes"], max_tokens=tokens) == ["yes"]


def test_constrained_and_free_rows_equal_their_solo_runs(nano: Nano) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"schema": COUNT},
        {"temperature": 1.0, "seed": 3},
        {"schema": SCHEMAS[9], "temperature": 1.0, "seed": 4},
        {"regex": "[a-z ]{5,30}", "temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"choices": ["six", "seven"]},
        {"schema": SCHEMAS[2], "repetition_penalty": 1.3},
        {"schema": SCHEMAS[3], "temperature": 1.2, "top_k": 5, "min_p": 0.01, "seed": 0},
    ]
    alone = [fv.generate(*nano, ASK, PENGUINS, **options) for options in kinds]
    assert texts_of(nano, kinds, PENGUINS) == alone
    assert alone[1] == COUNTED and alone[0] != COUNTED


def test_a_batch_of_one_kind(nano: Nano) -> None:
    asked = [(ASK, PENGUINS), ("What is this?", PANDA)]
    texts = fv.batch_generate(*nano, asked, schema=COUNT)
    assert texts == [fv.generate(*nano, *one, schema=COUNT) for one in asked]
    with pytest.raises(BatchError, match="Request 0: The answer was cut off after 5 tokens") as e:
        fv.batch_generate(*nano, asked, schema=COUNT, max_tokens=5)
    assert {type(error) for error in e.value.errors.values()} == {IncompleteAnswer}
    assert e.value.texts == [None, None]
    last = [r for _, r in stream_batch(*nano, asked, schema=COUNT, max_tokens=5)][-2:]
    assert [response.finish_reason for response in last] == ["length"] * 2


def test_a_schema_that_can_not_be_used_fails_its_row_and_no_other(nano: Nano) -> None:
    batch = Batch(*nano)
    wrong = batch.insert(ASK, PENGUINS, regex="(")
    right = batch.insert(ASK, PENGUINS, schema=COUNT)
    with pytest.raises(RequestError, match="regex can't be used: unclosed group") as caught:
        batch.step()
    assert caught.value.id == wrong
    text = ""
    while batch:
        for id, response in batch.step():
            assert id == right
            text += response.text
    assert text == COUNTED


def test_a_row_that_can_not_go_on_leaves_the_others_alone(nano: Nano) -> None:
    def nothing(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.full(logits.shape, -mx.inf)

    batch = Batch(*nano)
    wrong = batch.insert(ASK, PENGUINS, schema=COUNT, logits_processor=nothing)
    right = batch.insert(ASK, PENGUINS, schema=COUNT)
    text, errors = "", []
    while batch:
        try:
            for id, response in batch.step():
                assert id == right
                text += response.text
        except RequestError as error:
            errors.append(error)
    assert text == COUNTED
    assert [error.id for error in errors] == [wrong]
    assert "look at logits_processor" in str(errors[0])


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": 4}])
def test_a_processor_that_allows_nothing_is_an_error(options: Any, nano: Nano) -> None:
    def nothing(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.full(logits.shape, -mx.inf)

    with pytest.raises(ValueError, match="No token that the schema, regex or choices allow"):
        fv.generate(*nano, ASK, schema=COUNT, logits_processor=nothing, **options)


@pytest.mark.parametrize("drafts", [1, 10])
def test_look_up_changes_no_answer(drafts: int, nano: Nano) -> None:
    prompt = f"{COUNTED} {COUNTED} [1, 2, 3, 4] yes no"
    kinds = [{"schema": schema, "max_tokens": 25} for schema in SCHEMAS[::12]]
    kinds += [{"regex": "(yes|no)( yes| no){3,9}"}, {"choices": ["yes", "yes no yes"]}]
    for options in kinds:
        plain = [*fv.stream_generate(*nano, prompt, PENGUINS, **options)]
        found = [*fv.stream_generate(*nano, prompt, PENGUINS, prompt_lookup=drafts, **options)]
        assert [r.token for r in found] == [r.token for r in plain]
        assert found[-1].finish_reason == plain[-1].finish_reason


@pytest.mark.needs("jsonschema")
def test_sampling_with_look_up_and_penalties_stays_valid(nano: Nano) -> None:
    for seed, schema in enumerate(SCHEMAS[::6]):
        options = {"prompt_lookup": 4, "repetition_penalty": 1.1, "seed": seed}
        assert_valid(fv.generate(*nano, COUNTED, schema=schema, **options, **HOT), schema)


def test_a_draft_model_follows_too(nano: Nano) -> None:
    text = fv.generate(*nano, ASK, PENGUINS, schema=COUNT, draft_model=nano, num_draft_tokens=3)
    assert text == COUNTED


def test_masks_after_a_draft_are_those_that_come_with_its_tokens(nano: Nano) -> None:
    model, processor = nano
    vocab_size = model.config.text.vocab_size
    drafted = processor.tokenizer.encode(COUNTED)
    (end, *_) = processor.tokenizer.eos_token_ids
    wrong = processor.tokenizer.encode("x")

    def start() -> Any:
        return make_constraint(processor, vocab_size, Options(schema=COUNT))

    constraint = start()
    masks = constraint.masks([*drafted, end, *drafted])
    stepped = start()
    for i, token in enumerate(drafted):
        assert (masks[i] == stepped.mask[0]).all()
        assert (
            constraint.masks(drafted[i:] + wrong)[: len(drafted) + 1 - i]
            == masks[i : len(drafted) + 1]
        ).all()
        constraint.accept(token)
        stepped.accept(token)
    assert (masks[len(drafted) + 1 :] == -1).all()
    allowed = set(np.flatnonzero(bits_of(masks[len(drafted)])[:vocab_size]).tolist())
    assert allowed == processor.tokenizer.eos_token_ids and constraint.complete


def test_a_conversation(nano: Nano) -> None:
    chat = fv.Chat(*nano)
    assert chat.ask(ASK, image=PENGUINS, schema=COUNT) == COUNTED
    assert chat.ask("Is that many?", choices=["yes", "no"]) in ("yes", "no")
    free = chat.ask("What is in the image?")
    with pytest.raises(IncompleteAnswer) as caught:
        chat.ask(ASK, schema=COUNT, max_tokens=3)
    assert chat.messages[-1]["content"] == caught.value.text
    assert [m["content"] for m in chat.messages if m["role"] == "assistant"][:3:2] == [
        COUNTED,
        free,
    ]
    before = list(chat.messages)
    with pytest.raises(ValueError, match="regex can't be used"):
        chat.ask(ASK, regex="(")
    assert chat.messages == before
    streamed = chat.ask(ASK, choices=["one", "two"], stream=True)
    assert "".join(r.text for r in streamed) in ("one", "two")


def test_a_prompt_cache(nano: Nano) -> None:
    cache = fv.PromptCache(nano[0])
    for _ in range(2):
        assert fv.generate(*nano, ASK, PENGUINS, schema=COUNT, prompt_cache=cache) == COUNTED
    assert fv.generate(*nano, ASK, PENGUINS, prompt_cache=cache) == fv.generate(
        *nano, ASK, PENGUINS
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    half = fv.load(dtype=dtype)
    assert re.fullmatch("[0-9]{2}:[0-9]{2}", fv.generate(*half, ASK, regex="[0-9]{2}:[0-9]{2}"))


def test_threads_share_a_grammar(nano: Nano) -> None:
    streams = [fv.stream_generate(*nano, ASK, PENGUINS, schema=COUNT) for _ in range(4)]
    texts: dict[int, str] = {}

    def read(i: int) -> None:
        texts[i] = "".join(response.text for response in streams[i])
        mx.clear_streams()

    threads = [Thread(target=read, args=(i,)) for i in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(texts.values()) == [COUNTED] * len(streams)


def test_a_grammar_that_became_too_complex_is_compiled_again(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = nano
    letters = [processor.tokenizer.encode(letter)[0] for letter in "ab"]
    monkeypatch.setattr(constrain, "LEXER_STATES", 300)
    grown = []
    for seed in range(3):  # each would fail at once if it went on with the states of the last
        constraint = make_constraint(
            processor, model.config.text.vocab_size, Options(regex="[ab]*a[ab]{12}!")
        )
        assert constraint is not None
        chance = random.Random(seed)
        with pytest.raises(ValueError, match="became too complex within the answer"):
            for count in range(1000):
                grown.append(count)
                constraint.accept(chance.choice(letters))
    assert len(grown) > 3 * 100 and grown.count(100) == 3


# Masks


@pytest.mark.parametrize("vocab_size", [64, 100, 768])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_mask_rules_out_and_changes_nothing_else(vocab_size: int, dtype: mx.Dtype) -> None:
    numbers = np.random.default_rng(0)
    masks = numbers.integers(-(2**31), 2**31, (3, -(-vocab_size // 32))).astype(np.int32)
    logits = mx.random.normal((3, vocab_size), key=mx.random.key(0)).astype(dtype)
    masked = mask_logits(logits, masks)
    assert masked.dtype == dtype
    expected = np.where(
        bits_of(masks)[:, :vocab_size], np.array(logits.astype(mx.float32)), -np.inf
    )
    np.testing.assert_array_equal(np.array(masked.astype(mx.float32)), expected)


def test_rows_without_a_constraint_keep_their_logits(nano: Nano) -> None:
    model, processor = nano
    vocab_size = model.config.text.vocab_size
    constraint = make_constraint(processor, vocab_size, Options(choices=["yes"]))
    logits = mx.random.normal((3, vocab_size))
    masked = constrain_logits(logits, [None, constraint, None])
    assert mx.array_equal(masked[::2], logits[::2])
    assert 1 <= mx.isfinite(masked[1]).sum().item() <= 3  # "y", "ye", "yes"
    assert constrain_logits(logits, [None] * 3) is logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.2},
        {"top_k": 700, "top_p": 0.01},
        {"temperature": 1e-3},
    ],
)
def test_sampling_under_a_mask_meets_no_nan(options: Any, nano: Nano) -> None:
    model, processor = nano
    vocab_size = model.config.text.vocab_size
    constraint = make_constraint(processor, vocab_size, Options(choices=["yes", "no"]))
    assert constraint is not None
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        logits = (30 * mx.random.normal((1, vocab_size))).astype(dtype)
        masked = mask_logits(logits, constraint.mask)
        logprobs = masked.astype(mx.float32)
        logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
        assert not mx.isnan(logprobs).any()
        sample = make_sampler(Options(**{"temperature": 1.0, "seed": 0} | options))
        for _ in range(20):
            assert bits_of(constraint.mask)[0, sample(masked).item()]


def test_control_tokens_are_never_a_part(nano: Nano) -> None:
    model, processor = nano
    controls = set(processor.tokenizer.controls.values())
    ends = processor.tokenizer.eos_token_ids
    vocab_size = model.config.text.vocab_size
    assert processor.tokenizer.vocab_size < vocab_size  # ids without a token are none either
    constraint = make_constraint(processor, vocab_size, Options(regex="(?s:.)*"))
    assert constraint is not None
    for token in (None, *processor.tokenizer.encode("a<|im_")):
        if token is not None:
            constraint.accept(token)
        allowed = set(np.flatnonzero(bits_of(constraint.mask)[0]).tolist())
        assert allowed & controls == ends
        assert max(allowed) < processor.tokenizer.vocab_size
    with pytest.raises(ValueError):
        constraint.accept((controls - ends).pop())
    for text in ("<|im_start|>", "a<|im_end|>b", "Cafe\u0301", "Å\u212b"):
        assert fv.generate(*nano, ASK, choices=[text]) == text


# The command


def test_the_command(run: Run, nano: Nano, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(COUNT))
    asked = ("generate", "--image", PENGUINS, "--prompt", ASK, "--dtype", "float32")
    assert run(*asked, "--schema", schema).out == COUNTED + "\n"
    assert run(*asked, "--schema", json.dumps(COUNT)).out == COUNTED + "\n"
    assert re.fullmatch(r"[0-9]{2} cats\n", run(*asked, "--regex", "[0-9]{2} cats").out)
    chosen = fv.generate(*nano, ASK, PENGUINS, choices=["five", "six"])
    assert run(*asked, "--choice", "five", "--choice", "six").out == f"{chosen}\n"
    cut = run(*asked, "--schema", schema, "--max-tokens", "3", "--json")
    assert json.loads(cut.out)["finish_reason"] == "length" and cut.code == 2
    assert "Error: The answer was cut off after 3 tokens, before it was complete;" in cut.err
    for flags, said in (
        (("--schema", tmp_path / "none.json"), "There is no file"),
        (("--schema", '{"not": {}}'), "The schema's 'not' is not supported"),
        (("--regex", "("), "regex can't be used: unclosed group."),
        (("--regex", "a", "--choice", "b"), "Give regex or choices, not both."),
    ):
        result = run(*asked, *flags)
        assert (result.code, result.out) == (2, "")
        assert said in result.err and "Traceback" not in result.err


def test_the_library_is_needed_only_for_this() -> None:
    code = """
import sys
sys.modules["llguidance"] = None
import fastvlm_mlx as fv
nano = fv.load()
assert fv.generate(*nano, "Hi", max_tokens=2)
try:
    fv.stream_generate(*nano, "Hi", choices=["a"])
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == (
        "llguidance is needed for schema, regex and choices: pip install 'fastvlm-mlx[schema]'.\n"
    )
