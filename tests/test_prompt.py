import json
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx import processor as processor_module
from fastvlm_mlx.config import IMAGE_TOKEN_INDEX, CheckpointError
from fastvlm_mlx.processor import Processor
from fastvlm_mlx.text.messages import IMAGE_MARK
from fastvlm_mlx.text.prompt import build_prompt
from fastvlm_mlx.text.template import CONV_MODES, DEFAULT_SYSTEM, apply_chat_template
from fastvlm_mlx.text.tokenizer import QWEN2_SPLIT, Detokenizer, Tokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
# Ids that transformers' Qwen2Tokenizer gives, one -200 for each image.
EXPECTED = json.loads((DATA / "expected.json").read_text())
END_OF_TEXT, IM_START, IM_END = 740, 741, 742
VOCAB_SIZE = 743
EMBEDDING_ROWS = 768
# The folder of a model that transformers trained has such a template: contents are lists of parts.
PARTS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ response.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)

quick = settings(max_examples=60, deadline=None)
controls = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<", "|>", "<|", "im_end")
words = (
    "\n",
    " ",
    "user",
    "'s",
    "e\u0301",
    "\u0338",
    "漢字",
    "👩‍👩‍👧",
    "\u00a0",
    "42",
    "The image",
)
pieces = st.sampled_from(controls + words)
texts = st.lists(pieces | st.text(max_size=8), max_size=20).map("".join)
plain_texts = texts.map(lambda text: text.replace("<|", "<").replace(IMAGE_MARK, ""))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DATA)


@pytest.fixture(scope="module")
def older_tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_folder(without_tokenizer_json(tmp_path_factory.mktemp("older")))


def folder_with(folder: Path, config: dict | None = None, **added: dict) -> Path:
    """A tokenizer folder like DATA, with changed settings and files (`a_json` is a.json)."""
    spec = json.loads((DATA / "tokenizer.json").read_text())
    spec["added_tokens"] += added.pop("added_tokens", [])
    settings = json.loads((DATA / "tokenizer_config.json").read_text()) | (config or {})
    files = {"tokenizer_json": spec, "tokenizer_config_json": settings, **added}
    for name, value in files.items():
        (folder / name.replace("_json", ".json")).write_text(json.dumps(value))
    return folder


def without_tokenizer_json(folder: Path) -> Path:
    """The tokenizer in the form of the released checkpoints: vocab.json and merges.txt."""
    bpe = json.loads((DATA / "tokenizer.json").read_text())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in bpe["merges"]]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    settings = (DATA / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(settings)
    return folder


# Reading a folder


def test_attributes(tokenizer):
    assert tokenizer.eos_token_ids == {END_OF_TEXT, IM_END}
    assert tokenizer.pad_token_id == END_OF_TEXT
    assert tokenizer.bos_token_id is None
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert "<|im_start|>" in tokenizer.chat_template


@pytest.mark.parametrize(("given_ids", "added"), [(7, {7}), ([7, 740], {7}), (None, set())])
def test_more_eos_ids(given_ids, added):
    tokenizer = Tokenizer.from_folder(DATA, eos_token_ids=given_ids)
    assert tokenizer.eos_token_ids == {END_OF_TEXT, IM_END} | added


def test_special_tokens_given_with_their_flags(tmp_path):
    flags = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": {"content": "<|im_start|>"}}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, flags | {"pad_token": None}))
    assert tokenizer.bos_token_id == IM_START
    assert tokenizer.pad_token_id == END_OF_TEXT


def test_settings_are_optional(tmp_path):
    (tmp_path / "tokenizer.json").write_text((DATA / "tokenizer.json").read_text())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token_ids == {END_OF_TEXT, IM_END}


def test_chat_template_forms(tmp_path):
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    folder_with(tmp_path, {"chat_template": named})
    assert Tokenizer.from_folder(tmp_path).chat_template == "yes"
    folder_with(tmp_path, {"chat_template": None}, chat_template_json={"chat_template": "json"})
    assert Tokenizer.from_folder(tmp_path).chat_template == "json"
    folder_with(tmp_path, {"chat_template": "config"})
    assert Tokenizer.from_folder(tmp_path).chat_template == "config"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_folder(tmp_path).chat_template == "jinja"


@given(text=texts, allow_special=st.booleans())
@quick
def test_vocab_and_merges_give_the_same_ids(tokenizer, older_tokenizer, text, allow_special):
    ids = tokenizer.encode(text, allow_special=allow_special)
    assert older_tokenizer.encode(text, allow_special=allow_special) == ids
    assert older_tokenizer.decode(ids) == tokenizer.decode(ids)


def test_vocab_and_merges_give_the_same_attributes(tokenizer, older_tokenizer):
    assert older_tokenizer.controls == tokenizer.controls
    assert older_tokenizer.vocab_size == VOCAB_SIZE
    assert older_tokenizer.eos_token_ids == tokenizer.eos_token_ids
    spec = json.loads((DATA / "tokenizer.json").read_text())
    assert spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN2_SPLIT}


def test_added_tokens_keep_their_ids(tmp_path):
    folder = without_tokenizer_json(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    added = {"<|im_end|>": 752, "<|im_start|>": 741, "<|endoftext|>": 740}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.controls == added
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [752]
    assert tokenizer.decode([32, 752, 32]) == "AA"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"740": "x"}}'),
        ("vocab.json", "{"),
        ("merges.txt", "a b c"),
        ("added_tokens.json", "[]"),
        ("added_tokens.json", '{"<|im_end|>": [742]}'),
        ("chat_template.json", "{"),
    ],
)
def test_broken_file_is_named(tmp_path, name, text):
    folder = without_tokenizer_json(tmp_path)
    if name == "chat_template.json":  # read only where tokenizer_config.json has no template
        controls = {"added_tokens_decoder": {"740": {"content": "<|endoftext|>"}}}
        (folder / "tokenizer_config.json").write_text(json.dumps(controls))
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_folder(folder)


def test_not_a_byte_level_tokenizer(tmp_path):
    spec = json.loads((DATA / "tokenizer.json").read_text()) | {"decoder": {"type": "Fuse"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.from_folder(tmp_path)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path.name} has no tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_vocabulary_without_control_tokens(tmp_path):
    folder = without_tokenizer_json(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        Tokenizer.from_folder(folder)


# Text to ids and back


@pytest.mark.parametrize("case", EXPECTED["text"], ids=lambda case: repr(case["text"]))
def test_encodes_as_transformers(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]


@given(text=texts)
@quick
def test_text_comes_back_and_never_controls(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < END_OF_TEXT for i in ids)
    assert tokenizer.decode(ids) == normalize("NFC", text)


@given(text=texts)
@quick
def test_allowed_controls_become_their_ids(tokenizer, text):
    ids = tokenizer.encode(text, allow_special=True)
    assert ids.count(IM_START) == text.count("<|im_start|>")
    assert ids.count(IM_END) == text.count("<|im_end|>")


def test_added_tokens_that_are_not_special(tmp_path):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tool = {"id": 743, "content": "<tool call é>", **flags}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, added_tokens=[tool]))
    assert tokenizer.encode("<tool call é>", allow_special=True) == [743]
    assert 743 not in tokenizer.encode("<tool call é>")
    assert tokenizer.decode([743, IM_END]) == "<tool call é>"
    assert 743 not in build_prompt(tokenizer, "<tool call é>", num_visual_tokens=[])


def test_lone_surrogates_are_dropped(tokenizer):
    assert tokenizer.encode("a\ud800b\udfff") == tokenizer.encode("ab")
    hostile, plain = "<|im_\ud800end|>\ud801<\ud802image>", "<|im_end|><image>"
    expected = build_prompt(tokenizer, plain, num_visual_tokens=[3])
    assert build_prompt(tokenizer, hostile, num_visual_tokens=[3]) == expected


def test_every_byte_has_a_token(tokenizer):
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}


def test_decode(tokenizer):
    ids = [IM_START, 32, IM_END]
    assert tokenizer.decode(ids) == "A"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>A<|im_end|>"
    assert tokenizer.decode([32, IMAGE_TOKEN_INDEX, EMBEDDING_ROWS - 1, 32]) == "AA"


@given(ids=st.lists(st.integers(0, EMBEDDING_ROWS - 1), max_size=60), skip=st.booleans())
@quick
def test_decodes_as_tokenizers(tokenizer, ids, skip):
    from tokenizers import Tokenizer as Oracle

    oracle = Oracle.from_file(str(DATA / "tokenizer.json"))
    assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip)


# Ids to text, as they come

random_ids = st.lists(st.integers(-1, EMBEDDING_ROWS - 1), max_size=60)
byte_ids = st.lists(st.integers(94, 255), max_size=60)  # tokens of one byte: broken UTF-8


@given(ids=random_ids | byte_ids, skip=st.booleans())
@quick
def test_stream_equals_decode(tokenizer, ids, skip):
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=texts)
@quick
def test_stream_holds_back_half_characters(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    parts = list(map(detokenizer.add, tokenizer.encode(text)))
    assert "".join(parts) == normalize("NFC", text)
    assert ("\ufffd" in "".join(parts)) == ("\ufffd" in text)
    assert detokenizer.finish() == ""


def test_stream_gives_characters_at_once(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("a🙂")
    assert [detokenizer.add(i) for i in ids] == ["a", "", "", "", "🙂"]
    assert [detokenizer.add(i) for i in ids[:3]] == ["a", "", ""]
    assert detokenizer.finish() == "\ufffd"


# Chats

QUESTION = "What is in the image?"
SYSTEM_IDS = [IM_START, 739, 198, 274, 270, 268, 289, 282, 13, IM_END, 198]
USER_IDS = [IM_START, 84, 82, 68, 81, 198]
ASSISTANT_IDS = [IM_END, 198, IM_START, 734, 198]


@pytest.mark.parametrize(
    ("question", "ids"),
    [
        (QUESTION, [440, 293, 569, 307, 260, 30]),
        ("How many soccer balls are there?", [295, 299, 304, 325, 270, 309, 30]),
        ("Read the text.", [453, 307, 718, 13]),
    ],
)
def test_prompt_of_the_reference(tokenizer, question, ids):
    expected = [*SYSTEM_IDS, *USER_IDS, *[IMAGE_TOKEN_INDEX] * 16, 198, *ids, *ASSISTANT_IDS]
    assert build_prompt(tokenizer, question, num_visual_tokens=[16]) == expected


@pytest.mark.parametrize("case", EXPECTED["chat"], ids=lambda case: case["messages"][-1]["content"])
@pytest.mark.parametrize("template", ["own", "none", "parts", "qwen_2"])
def test_chat_as_transformers(tmp_path, case, template):
    changes = {"none": {"chat_template": None}, "parts": {"chat_template": PARTS_TEMPLATE}}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, changes.get(template)))
    ids = build_prompt(
        tokenizer,
        case["messages"],
        num_visual_tokens=[1] * case["ids"].count(IMAGE_TOKEN_INDEX),
        conv_mode="qwen_2" if template == "qwen_2" else None,
    )
    assert ids == case["ids"]


@given(system=plain_texts, turns=st.lists(plain_texts, min_size=1, max_size=4))
@quick
def test_chat_is_its_text_cut_as_one(tokenizer, system, turns):
    roles = ["system", *["user", "assistant"] * 2]
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, [system, *turns], strict=False)
    ]
    text = apply_chat_template(tokenizer, messages)
    ids = build_prompt(tokenizer, messages, num_visual_tokens=[])
    assert ids == tokenizer.encode(text, allow_special=True)


@given(texts=st.tuples(texts, texts, texts), conv_mode=st.sampled_from([None, *CONV_MODES]))
@quick
def test_turns_bring_no_control_tokens(tokenizer, texts, conv_mode):
    roles = ("system", "user", "assistant")
    hostile = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    harmless = [{**message, "content": "x"} for message in hostile]
    images = [2] * texts[1].count(IMAGE_MARK)
    ids = build_prompt(tokenizer, hostile, num_visual_tokens=images, conv_mode=conv_mode)
    safe = build_prompt(tokenizer, harmless, num_visual_tokens=[], conv_mode=conv_mode)
    assert [i for i in ids if i >= END_OF_TEXT] == [i for i in safe if i >= END_OF_TEXT]
    assert ids.count(IMAGE_TOKEN_INDEX) == 2 * len(images)
    hostile[1]["content"] = texts[1].replace(IMAGE_MARK, "")
    shown = apply_chat_template(tokenizer, hostile, conv_mode=conv_mode)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert normalize("NFC", text) == normalize("NFC", shown)


def test_template_may_trim_and_ask(tmp_path):
    template = (
        "{% for message in messages %}{% if message.content %}<|im_start|>"
        "{{ message.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {"chat_template": template}))
    messages = [
        {"role": "user", "content": " \n<|im_end|>A<image> "},
        {"role": "assistant", "content": ""},
    ]
    ids = build_prompt(tokenizer, messages, num_visual_tokens=[2])
    places = [IMAGE_TOKEN_INDEX] * 2
    assert ids == [IM_START, *tokenizer.encode("<|im_end|>A"), *places, IM_END]


def test_template_environment(tmp_path):
    template = (
        "{%- for message in messages %}\n    {% if loop.first %}\n{{ eos_token }}{% endif %}\n"
        "{{ message | tojson }}{{ strftime_now('%Y') | length }}{% break %}{% endfor %}"
    )
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {"chat_template": template}))
    text = apply_chat_template(tokenizer, "é<b>")
    assert text == '<|im_end|>{"role": "user", "content": "é<b>"}4'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 + 'a' }}", "chat template"),
        ("{{ raise_exception('a' * 10000) }}", "a…$"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "steps"),
    ],
)
def test_failing_template(tmp_path, template, message):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, {"chat_template": template}))
    with pytest.raises(ValueError, match=message):
        apply_chat_template(tokenizer, "x")


def test_chat_text_without_generation_prompt(tokenizer):
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    text = apply_chat_template(tokenizer, messages, add_generation_prompt=False)
    assert text == (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    )
    assert apply_chat_template(tokenizer, messages) == text + "<|im_start|>assistant\n"


def test_system_prompt(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A"}]
    ids = build_prompt(tokenizer, "A", num_visual_tokens=[], system="Be brief.")
    assert ids == build_prompt(tokenizer, messages, num_visual_tokens=[])
    with pytest.raises(ValueError, match="twice"):
        build_prompt(tokenizer, messages, num_visual_tokens=[], system="Be brief.")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["text"],
        [{"role": "tool", "content": "A"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": ["user"], "content": "A"}],
    ],
)
def test_malformed_messages(tokenizer, messages):
    with pytest.raises(ValueError, match="message"):
        build_prompt(tokenizer, messages, num_visual_tokens=[])


# Conversation modes


@pytest.mark.parametrize(
    ("conv_mode", "text"),
    [
        (
            "qwen_2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
            "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nA<|im_end|>"
            "<|im_start|>assistant\nB<|im_end|><|im_start|>user\nC<|im_end|><|im_start|>assistant\n",
        ),
        (
            "v1",
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
            "USER: A ASSISTANT: B</s>USER: C ASSISTANT:",
        ),
        ("plain", "A\nB\nC\n"),
    ],
)
def test_conversation_modes(tokenizer, conv_mode, text):
    turns = zip(("user", "assistant", "user"), "ABC", strict=True)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert apply_chat_template(tokenizer, messages, conv_mode=conv_mode) == text
    ids = build_prompt(tokenizer, messages, num_visual_tokens=[], conv_mode=conv_mode)
    assert ids == tokenizer.encode(text, allow_special=True)


def test_conversation_mode_takes_a_system_prompt(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}]
    assert apply_chat_template(tokenizer, messages, conv_mode="v1") == "S USER: A ASSISTANT:"


def test_unknown_conversation_mode(tokenizer):
    with pytest.raises(ValueError, match=r"'qwen_9'.*qwen_2.*plain"):
        build_prompt(tokenizer, "A", num_visual_tokens=[], conv_mode="qwen_9")


# Images


def runs(ids: list[int]) -> list[int]:
    """Lengths of the runs of image places."""
    text = "".join("i" if i == IMAGE_TOKEN_INDEX else " " for i in ids)
    return [len(run) for run in text.split()]


def test_images_come_before_the_first_question(tokenizer):
    messages = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    ids = build_prompt(tokenizer, messages, num_visual_tokens=[2, 3])
    messages[0]["content"] = "<image>\n<image>\nA"
    assert runs(ids) == [2, 3]
    assert ids == build_prompt(tokenizer, messages, num_visual_tokens=[2, 3])


@given(images=st.lists(st.tuples(st.integers(1, 5), plain_texts), min_size=1, max_size=5))
@quick
def test_images_stand_at_their_marks(tokenizer, images):
    counts = [count for count, _ in images]
    marked = [IMAGE_MARK + text for _, text in images]
    contents = ["A" + "".join(marked[:2]), "B" + "".join(marked[2:])]
    messages = [{"role": "user", "content": content} for content in contents]
    ids = build_prompt(tokenizer, messages, num_visual_tokens=counts)
    assert sum(runs(ids)) == sum(counts)
    first, *others = apply_chat_template(tokenizer, messages).split(IMAGE_MARK)
    expected = tokenizer.encode(first, allow_special=True)
    for count, text in zip(counts, others, strict=True):
        expected += [IMAGE_TOKEN_INDEX] * count + tokenizer.encode(text, allow_special=True)
    assert ids == expected


@pytest.mark.parametrize("images", [0, 1, 3])
def test_marks_must_match_images(tokenizer, images):
    counts = f"2 <image> mark.* {images} image"
    with pytest.raises(ValueError, match=counts):
        build_prompt(tokenizer, "<image><image>", num_visual_tokens=[4] * images)


def test_marks_count_in_user_turns_only(tokenizer):
    messages = [
        {"role": "system", "content": "<image>"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "<image>"},
        {"role": "user", "content": "B"},
    ]
    ids = build_prompt(tokenizer, messages, num_visual_tokens=[3])
    assert runs(ids) == [3]
    assert tokenizer.decode(ids).count(IMAGE_MARK) == 2
    messages[3]["content"] = "B<image>"
    ids = build_prompt(tokenizer, messages, num_visual_tokens=[3])
    assert runs(ids) == [3]
    assert tokenizer.decode(ids).count(IMAGE_MARK) == 2


def test_image_as_an_added_token(tmp_path):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    image = {"id": 743, "content": IMAGE_MARK, "special": True, **flags}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, added_tokens=[image]))
    messages = [
        {"role": "user", "content": "<image>A"},
        {"role": "assistant", "content": "<image>"},
    ]
    ids = build_prompt(tokenizer, messages, num_visual_tokens=[3], image_token_index=743)
    assert ids.count(743) == 3


def test_images_need_a_user_turn(tokenizer):
    with pytest.raises(ValueError, match="no user message"):
        build_prompt(tokenizer, [{"role": "assistant", "content": "A"}], num_visual_tokens=[3])


# The processor


def test_processor(tokenizer, monkeypatch):
    seen = []
    for name in ("preprocess", "preprocess_each"):
        monkeypatch.setattr(
            processor_module, name, lambda *args, **options: seen.append((*args, options))
        )
    processor = Processor(tokenizer, 256, mode="anyres", grid_pinpoints=[(512, 256)])
    for call in (processor.preprocess, processor.preprocess_each):
        call("cat.png")
        call("cat.png", 512, fast=True, dtype=mx.uint8)
        assert seen.pop(0) == (
            *("cat.png", 256, "anyres", [(512, 256)]),
            {"fast": False, "dtype": mx.float32},
        )
        assert seen.pop(0) == (
            *("cat.png", 512, "anyres", [(512, 256)]),
            {"fast": True, "dtype": mx.uint8},
        )
    assert processor.num_visual_tokens() == 16
    assert processor.num_visual_tokens(1024) == 256
    for size in (0, 100):
        with pytest.raises(ValueError, match=f"multiple of 64, found {size}"):
            processor.num_visual_tokens(size)


def test_starts_without_heavy_imports():
    script = (
        "import sys; from fastvlm_mlx.text import *\n"
        "assert not {'tokenizers', 'jinja2', 'transformers', 'mlx_lm'} & set(sys.modules)\n"
        f"build_prompt(Tokenizer.from_folder({str(DATA)!r}), 'A', num_visual_tokens=[4])\n"
        "assert not {'transformers', 'mlx_lm', 'huggingface_hub'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)
