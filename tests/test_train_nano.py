"""The recipe of the bundled model: its pictures, questions, tokenizer, batches and loss."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_for_training
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.text.prompt import build_prompt

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.train_nano import (
    batches,
    draw,
    evaluate,
    fonts,
    learn,
    models,
    rows,
    scenes,
    sets,
    shapes,
    stages,
    store,
    texts,
    tokenizer,
    train,
    words,
)

SIZE = 64


@pytest.fixture(autouse=True, scope="module")
def installed_fonts() -> None:
    try:
        fonts.check()
    except fonts.MissingError as missing:
        pytest.skip(str(missing))


def drawn(task: str, number: int, **options) -> list:
    return [draw.draw(3, i, SIZE, task=task, **options) for i in range(number)]


@pytest.mark.parametrize("task", draw.SCENES)
def test_a_scene_depends_on_its_seed_and_number_only(task):
    first, again, other = (draw.draw(5, i, SIZE, task=task) for i in (7, 7, 8))
    assert first[1] == again[1]
    for one, two in zip(first[0].pictures, again[0].pictures, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(two))
    assert not np.array_equal(np.asarray(first[0].pictures[0]), np.asarray(other[0].pictures[0]))


@pytest.mark.parametrize("task", draw.SCENES)
def test_a_scene_has_enough_rows_that_differ(task):
    for scene, found in drawn(task, 10):
        assert len(found) == draw.ROWS_OF_A_SCENE
        singles = [row.turns[0][0] for row in found if len(row.turns) == 1]
        assert len(set(singles)) == len(singles) >= 7
        asked = {}
        for ask in scene.asks:  # one question has one answer
            assert asked.setdefault(ask.question, ask.answer) == ask.answer


def test_counts_in_answers_are_those_of_the_picture():
    for scene, _ in drawn("kinds", 20):
        numbers = Counter(thing.name for thing in scene.things)
        for ask in scene.asks:
            if match := re.fullmatch(r"There (?:is|are) (\d+|no) (.+)\.", ask.answer):
                number = 0 if match[1] == "no" else int(match[1])
                fitting = {n for n in words.ALL if match[2] in (n, words.plural(n))}
                assert match[2] == "objects" or numbers[fitting.pop()] == number
        assert scene.task == "kinds" and sum(numbers.values()) <= 9


def test_places_in_answers_are_those_of_the_picture():
    seen = Counter()
    for scene, _ in drawn("places", 30):
        at = {thing.name: thing for thing in scene.things}
        for ask in scene.asks:
            match = re.fullmatch(
                r"Yes, the (.+) is (left of|right of|above|below) the (.+)\.", ask.answer
            )
            if match and ask.task == "places":
                one, other = at[match[1]], at[match[3]]
                seen[match[2]] += 1
                assert {
                    "left of": one.x < other.x,
                    "right of": one.x > other.x,
                    "above": one.y < other.y,
                    "below": one.y > other.y,
                }[match[2]]
            if match := re.fullmatch(r"The (.+) is bigger\.", ask.answer):
                assert at[match[1]].size > 1.3 * min(thing.size for thing in scene.things)
    assert len(seen) == 4


def test_shapes_show_the_colour_that_is_said():
    for scene, _ in drawn("shapes", 20, noise=False):
        pixels = np.asarray(scene.pictures[0], int)
        for thing in scene.things:
            seen = pixels[int(thing.y * SIZE), int(thing.x * SIZE)]
            assert np.abs(seen - words.COLORS[thing.color]).max() <= 25


def test_a_place_near_a_border_has_no_name():
    assert words.place(0.1, 0.1) == "at the top left"
    assert words.place(0.5, 0.5) == "in the middle"
    assert words.place(0.9, 0.5) == "on the right"
    assert words.place(0.34, 0.5) is None
    assert words.relation(0.05, 0.3) == ["above"]


def test_colours_have_names_where_they_are_clear():
    from examples.train_nano.brush import color_name

    for name, color in words.COLORS.items():
        assert color_name(color) in (name, None)
    assert color_name((128, 0, 64)) is None


@pytest.mark.parametrize("task", ["handwriting", "print"])
def test_held_out_strings_are_never_trained_on(task):
    training = {scene.text for scene, _ in drawn(task, 60)}
    held_out = {scene.text for scene, _ in drawn(task, 20, evaluation=True)}
    assert not any(map(words.held_out, training)) and all(map(words.held_out, held_out))


def test_held_out_places_and_combinations_are_never_trained_on():
    for evaluation in (False, True):
        for scene, _ in drawn("emoji", 20, evaluation=evaluation):
            thing = scene.things[0]
            assert words.held_out(scenes.at_cell(thing.name, thing.x, thing.y)) is evaluation
        for task in ("kinds", "places"):
            for scene, _ in drawn(task, 10, evaluation=evaluation):
                key = "+".join(sorted({thing.name for thing in scene.things}))
                assert words.held_out(key) is evaluation
        for scene, _ in drawn("shapes", 10, evaluation=evaluation):
            assert words.held_out(shapes._key(scene.things)) is evaluation


def test_strings_are_of_the_lengths_that_are_promised():
    from random import Random

    rng = Random(0)
    assert {len(texts.note_string(rng)) for _ in range(300)} == {2, 3, 4, 5, 6}
    assert max(len(texts.print_string(rng)) for _ in range(300)) == texts.LONGEST_PRINT


def test_text_fits_in_the_picture():
    for i in range(20):
        scene, _ = draw.draw(3, i, 256, task="print", noise=False)
        pixels = np.asarray(scene.pictures[0], int)
        border = np.concatenate([pixels[:, 0], pixels[:, -1]])
        assert np.abs(border - pixels[0, 0]).max() < 60


@pytest.fixture(scope="module")
def tokenizers_made(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, base in (("fresh", None), ("grown", NANO)):
        made[name] = tmp_path_factory.mktemp(name)
        tokenizer.write(made[name], base)
    return made


@pytest.mark.parametrize("name", ["fresh", "grown"])
def test_the_tokenizer_gives_back_every_text(name, tokenizers_made):
    made = fv.text.Tokenizer.from_folder(tokenizers_made[name])
    for text in ['The note says "qZ7".', "How many pears are there?", "naïve 日本 🐱\n\tx", "  a"]:
        assert made.decode(made.encode(text)) == text
    assert len(made.encode(" clocks")) == len(made.encode(" pictures")) == 1
    for text in ("xylem", "BRIGHT", "40291"):  # what is read is one token a letter
        assert len(made.encode(f'"{text}".')) == len(text) + 2
    (end,) = made.encode("<|im_end|>", allow_special=True)
    assert made.decode([end], skip_special_tokens=False) == "<|im_end|>"


def test_the_grown_tokenizer_keeps_the_ids_of_old_texts(tokenizers_made):
    old = fv.text.Tokenizer.from_folder(NANO)
    new = fv.text.Tokenizer.from_folder(tokenizers_made["grown"])
    for question in sets.READING + sets.EMOJI + sets.COUNTING:
        ids = [build_prompt(each, question, num_visual_tokens=[2]) for each in (old, new)]
        assert ids[0] == ids[1]


def test_the_pieces_of_a_row_are_the_prompt_that_generate_makes():
    processor = fv.load()[1]
    encoder = batches.Encoder(processor.tokenizer)
    turns = (("What is this?", "A cat."), ("Where is it?", "It is in the middle."))
    ids, supervised = encoder.row(rows.Row("follow_up", turns))
    prefix, places = encoder.prefix(2, 3)
    whole = [-200 if n in places else token for n, token in enumerate(prefix)] + ids
    whole = encoder.ids(batches.OPENED) + whole
    messages = [{"role": "user", "content": [{"type": "image"}] * 2 + [turn(turns[0][0])]}]
    messages += [
        {"role": "assistant", "content": turns[0][1]},
        {"role": "user", "content": turns[1][0]},
    ]
    prompt = build_prompt(processor.tokenizer, messages, num_visual_tokens=[3, 3])
    assert whole[: len(prompt)] == prompt
    answers = [token for token, is_answer in zip(ids, supervised, strict=True) if is_answer]
    said = processor.tokenizer.decode(answers, skip_special_tokens=False)
    assert said == "A cat.<|im_end|>It is in the middle.<|im_end|>"


def turn(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def small_store(folder: Path, **changes) -> store.Store:
    settings = store.Settings(**{"scenes": 6, "size": SIZE, "seed": 4} | changes)
    for _ in store.fill(folder, settings):
        pass
    return store.Store(folder)


def test_drawing_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FLUSHED_AFTER", 2)
    whole = small_store(tmp_path / "whole")
    small_store(tmp_path / "cut", scenes=6)
    path = tmp_path / "cut" / "scenes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # as a crash leaves it
    again = small_store(tmp_path / "cut")
    assert again.scenes == whole.scenes
    assert np.array_equal(again.pixels, whole.pixels)
    with pytest.raises(ValueError, match="other settings"):
        small_store(tmp_path / "cut", seed=5)


def test_a_reader_sees_only_whole_scenes(tmp_path):
    found = small_store(tmp_path)
    path = tmp_path / "scenes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert len(store.Store(tmp_path)) == len(found) - 1
    path.write_bytes(whole)
    assert len(store.Store(tmp_path)) == len(found)


@pytest.fixture(scope="module")
def nano_for_training():
    model = load_for_training(NANO, dtype="float32")
    model.freeze()
    model.vision_tower.unfreeze()
    model.mm_projector.unfreeze()
    return model, batches.Encoder(fv.load()[1].tokenizer)


def data_of(folder: Path, encoder, **changes) -> batches.StoreData:
    mix = draw.PAIRS_MIX if changes.pop("pairs", False) else None
    found = small_store(folder, scenes=12, mix=mix)
    arguments = {"scenes": 4, "singles": 2, "talks": 1, "visual_tokens": 1, "seed": 3}
    return batches.Mixed([batches.StoreData(found, encoder, **arguments | changes)])


def test_batches_are_the_same_from_any_start(tmp_path, nano_for_training):
    data = data_of(tmp_path, nano_for_training[1], pairs=True)
    whole = list(data.batches(1, 0))
    assert len(whole) == data.count(1) > 2
    for found, again in zip(whole[1:], data.batches(1, 1), strict=True):
        assert found.ids == again.ids
        same = dict(tree_flatten(again.arrays))
        assert all(mx.array_equal(value, same[n]) for n, value in tree_flatten(found.arrays))
    assert [batch.ids for batch in data.batches(2, 0)] != [batch.ids for batch in whole]


def test_the_loss_is_that_of_each_row_by_itself(tmp_path, nano_for_training):
    """Several questions of one encoded picture have the loss of whole prompts, one at a time."""
    model, encoder = nano_for_training
    data = data_of(tmp_path, encoder, pairs=True, scenes=2)
    for batch in list(data.batches(0, 0))[:3]:
        total, count = learn.loss(model, batch.arrays)
        arrays = batch.arrays
        opened, prefix = arrays["opened"][0], arrays["prefix"]
        places = [divmod(place, prefix.shape[1]) for place in arrays["places"].tolist()]
        tokens = model.encode_image(arrays["pixel_values"]).flatten(0, 1)
        asked = Counter(n for group in arrays["questions"] for n in group["scenes"].tolist())
        assert set(asked.values()) == {3}
        expected, supervised = 0.0, 0.0
        for group in arrays["questions"]:
            states = []
            for scene, row in zip(group["scenes"].tolist(), group["input_ids"], strict=True):
                whole = mx.concatenate([opened, prefix[scene], row])[None]
                own = [n for n, (of, _) in enumerate(places) if of == scene]
                at = mx.array([len(opened) + places[n][1] for n in own])
                embeddings = model.embed_at(whole, tokens[own[0] : own[-1] + 1], at)
                read = model.language_model.hidden_states(None, None, embeddings)
                states.append(read[0, -len(row) :])
            logits = model.language_model.logits(mx.concatenate(states))
            chosen = logits[group["positions"]]
            shifted = chosen - mx.logsumexp(chosen, axis=-1, keepdims=True)
            own_loss = -mx.take_along_axis(shifted, group["targets"][:, None], axis=-1)
            expected += (own_loss[:, 0] * group["weights"]).sum().item()
            supervised += group["weights"].sum().item()
        assert count.item() == supervised > 0
        assert abs(total.item() - expected) < 1e-4 * expected


def test_helper_heads_add_to_the_loss_and_lose_weight(tmp_path, nano_for_training):
    model, encoder = nano_for_training
    data = data_of(tmp_path, encoder, helper=(1.0, 0.0), steps=3)
    plain = data_of(tmp_path, encoder)
    model.heads = learn.Heads(model.config.mm_hidden_size, 1)
    found = []
    for batch, same in zip(data.batches(0, 0), plain.batches(0, 0), strict=True):
        more = learn.loss(model, batch.arrays)[0] - learn.loss(model, same.arrays)[0]
        found.append((batch.arrays["helper"].item(), more.item()))
    del model["heads"]
    assert [weight for weight, _ in found] == pytest.approx([1, 2 / 3, 1 / 3])
    assert all(more > 0 for _, more in found)


def test_intervals_are_wilsons():
    low, high = evaluate.interval(80, 100)  # as statsmodels' proportion_confint gives it
    assert (round(low, 4), round(high, 4)) == (0.7112, 0.8666)


def test_a_set_is_drawn_asked_and_reported(tmp_path, nano):
    sets.write_set(tmp_path / "set", "counting", 3, 256)
    sets.write_set(tmp_path / "set", "pairs", 2, 256)
    found = evaluate.read_set(tmp_path / "set")
    assert {len(row["images"]) for row in found} == {1, 2}
    assert all(row["question"] and Path(row["images"][0]).is_file() for row in found)
    result = evaluate.evaluate(*nano, found)
    assert result["tasks"]["counting"][1] == 3
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result))
    assert "| counting | " in evaluate.report([path])


def test_recipes_read_stores_of_their_own():
    for recipe in stages.RECIPES.values():
        whole = [each for stage in recipe for each in stage.pictures]
        assert len(set(map(stages.store_name, whole))) == len(whole)
        for stage in stages.scaled(recipe, 0.001):
            assert stage.steps >= 1
            assert all(each.scenes >= stage.scenes_of(each) for each in stage.pictures)


def logits_of(model, size: int) -> mx.array:
    ids = mx.array([[741, 739, 198, *[-200] * (size // 64) ** 2, 198, 33, 742]])
    pixels = mx.random.uniform(shape=(1, size, size, 3), key=mx.random.key(1))
    return model(ids, pixel_values=pixels)


def base_in(folder: Path) -> fv.FastVLM:
    """A float model with random weights, and its folder."""
    models.fresh(folder)
    return fv.load_model(folder, dtype="float32")


def test_the_grown_model_answers_as_before(tmp_path):
    before = base_in(tmp_path / "base")
    models.grow(tmp_path / "base", tmp_path / "grown")
    after, processor = fv.load(tmp_path / "grown", dtype="float32")
    assert len(after.layers) == 6 > len(before.layers)
    assert sum(value.size for _, value in tree_flatten(after.parameters())) < 12_000_000
    for size in (128, 192):
        # Of the tokens that both have; rows without a token were random and no longer are.
        one, two = (logits_of(model, size)[..., :768] for model in (before, after))
        assert mx.abs(one - two).max() < 1e-4 * mx.abs(one).max()
    assert fv.generate(after, processor, "What is this?", max_tokens=2) is not None


def test_a_fresh_model_in_training_form_is_written_and_read_again(tmp_path):
    answering = base_in(tmp_path)
    model = models.load_trainable(tmp_path)
    model.eval()
    one, two = logits_of(answering, 128), logits_of(model, 128)
    assert mx.abs(one - two).max() < 1e-3 * mx.abs(one).max()
    assert type(model.vision_tower) is not type(answering.vision_tower)


def test_a_fresh_model_learns_from_a_batch(tmp_path, monkeypatch):
    """A stage as it runs: helper heads, the encoder in training form, and what it leaves."""
    monkeypatch.setattr(train, "VALIDATION_SCENES", 2)
    monkeypatch.setattr(train, "CURVE_ROWS", 1)
    monkeypatch.setattr(train, "CURVE_TASKS", ("emoji",))
    work, base = tmp_path / "work", tmp_path / "base"
    models.fresh(base)
    pictures = store.Settings(scenes=4, size=128, seed=2, mix=stages.TODAY)
    stage = stages.Stage("small", (pictures,), steps=3, scenes=1, helper=(1.0, 0.1))
    for _ in store.fill(work / stages.store_name(pictures), pictures):
        pass
    out = work / "recipe" / "0-small"
    train.run_stage(work, base, out, stage, every=100)
    before, after = (models.load_trainable(each).vision_tower for each in (base, out / "model"))
    for name, value in models.parameters_of(after).items():
        assert mx.isfinite(value).all()
        assert (
            not mx.array_equal(value, models.parameters_of(before)[name]) or "running" not in name
        )
    train.draw_curve(work / "recipe", [stage])
    assert (work / "recipe" / "curve.png").is_file()
    lines = (work / "recipe" / "curve.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["stage"] == "small" and "rows" not in lines[0]
