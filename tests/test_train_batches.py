"""Examples → batches: which rows, in which order, how they are laid out, and their images."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import one_sentence
from models import PANDA, PENGUINS, random_model

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.config import load_config
from fastvlm_mlx.generation.inputs import read_inputs
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.train.augment import Augment, random_of
from fastvlm_mlx.train.batches import Batch, Batches, collate
from fastvlm_mlx.train.examples import Example, Span, build_example
from fastvlm_mlx.train.features import FeatureCache
from fastvlm_mlx.train.images import ImageReader
from fastvlm_mlx.train.loss import arrays_of, hidden_states
from fastvlm_mlx.train.order import Order, bucket, pack_rows
from fastvlm_mlx.train.rows import Row

PROCESSOR, CONFIG = load_processor(NANO), load_config(NANO)
END = PROCESSOR.tokenizer.controls["<|im_end|>"]


def example(n: int, images: int = 0, words: int | None = None) -> Example:
    """A short conversation, its length, id and answer from a number."""
    question = "<image>\n" * images + "word " * ((n * 7) % 40 if words is None else words)
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"Answer {n}."},
    ]
    sources: list[Any] = [(PANDA, PENGUINS)[(n + i) % 2] for i in range(images)]
    return build_example(Row(f"row {n}", messages, sources, f"row {n}"), PROCESSOR, CONFIG)


TEXTS = [example(n) for n in range(70)]
MIXED = [example(n, images=n % 3) for n in range(20)]
READER = ImageReader(PROCESSOR)


def batches_of(examples: list[Example], order: Order, rank: int = 0) -> Batches:
    return Batches(examples, READER, order, rank)


def ids_of(batches: Batches, epoch: int = 0, start: int = 0) -> list[list[str]]:
    rows = batches.plan(epoch)[start:]
    return [[batches.examples[n].id for row in batch for n in row] for batch in rows]


def flat(batches: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(batches))


# The order


@pytest.mark.parametrize("pack", [None, 128])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(pack: int | None) -> None:
    batches = batches_of(TEXTS, Order(4, seed=1, pack=pack))
    epochs = [flat(ids_of(batches, epoch)) for epoch in (0, 1, 0)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(e.id for e in TEXTS)
    assert epochs[0] == epochs[2] != epochs[1]
    other = batches_of(TEXTS, Order(4, seed=2, pack=pack))
    assert flat(ids_of(other)) != epochs[0]


def test_the_order_does_not_depend_on_python_s_hashes_nor_on_the_file_s_order() -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_train_batches import *\n"
        "print([e.id for s in Order(4, seed=3).steps(TEXTS, 2) for b in s for r in b "
        "for e in [TEXTS[r[0]]]])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "7")
    }
    assert said == {f"{flat(ids_of(batches_of(TEXTS, Order(4, seed=3)), 2))}\n"}
    turned = batches_of(TEXTS[::-1], Order(70, seed=3))
    assert sorted(flat(ids_of(turned))) == sorted(e.id for e in TEXTS)


def test_an_epoch_goes_on_anywhere() -> None:
    batches = batches_of(MIXED, Order(3, seed=5))
    whole = list(batches.batches(1))
    assert [batch.ids for batch in whole] == ids_of(batches, 1)
    assert len(whole) == batches.count(1)
    for start in (0, 2, len(whole) - 1, len(whole)):
        rest = list(batches_of(MIXED, Order(3, seed=5)).batches(1, start))
        assert len(rest) == len(whole) - start
        for found, wanted in zip(rest, whole[start:], strict=True):
            assert_equal(found, wanted)


def assert_equal(found: Batch, wanted: Batch) -> None:
    assert found.ids == wanted.ids and found.image_sizes == wanted.image_sizes
    for name in ("input_ids", "targets", "weights", "places", "pixel_values", "segments"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None)
        assert one is None or mx.array_equal(one, other).item()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pack", [None, 128])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_share_the_rows_of_one_process_s_batch(
    ranks: int, pack: int | None, accumulation: int
) -> None:
    one = Order(2 * ranks, accumulation, seed=1, pack=pack)
    several = Order(2, accumulation, seed=1, ranks=ranks, pack=pack)
    together = one.steps(TEXTS, 0)
    apart = [several.steps(TEXTS, 0, rank) for rank in range(ranks)]
    assert len({len(steps) for steps in apart} | {len(together)}) == 1
    for step, shares in zip(together, zip(*apart, strict=True), strict=True):
        rows = [row for share in shares for batch in share for row in batch]
        assert len(set(rows)) == len(rows)
        assert sorted(rows) == sorted(row for batch in step for row in batch)
        assert len({len(share) for share in shares}) == 1  # every rank waits for the others
        assert all(len(batch) <= 2 for share in shares for batch in share)


def test_all_steps_but_the_last_have_all_their_batches() -> None:
    for examples in (TEXTS, TEXTS[:64]):
        steps = Order(4, 3, seed=0).steps(examples, 0)
        assert {len(step) for step in steps[:-1]} == {3}
        assert 1 <= len(steps[-1]) <= 3
        assert sum(len(batch) for step in steps for batch in step) == len(examples)


def test_evaluation_keeps_the_order_and_every_row() -> None:
    ids = ids_of(batches_of(TEXTS[:7], Order(4, seed=None)))
    assert ids == [[e.id for e in TEXTS[:4]], [e.id for e in TEXTS[4:7]]]
    shares = [ids_of(batches_of(TEXTS[:3], Order(4, seed=None, ranks=4), r)) for r in range(4)]
    assert shares == [[["row 0"]], [["row 1"]], [["row 2"]], [[]]]
    (empty,) = batches_of(TEXTS[:3], Order(4, seed=None, ranks=4), 3).batches(0)
    assert empty.ids == [] and empty.tokens == 0
    assert empty.weights.sum().item() == 0 and empty.input_ids.shape == (1, 32)


def test_fewer_rows_than_a_batch_are_named() -> None:
    with pytest.raises(ValueError, match=r"There are 7 row\(s\) .* fewer than the 8") as error:
        Order(4, ranks=2).steps(TEXTS[:7], 0)
    one_sentence(error)
    assert len(Order(4, 5, ranks=2).steps(TEXTS[:8], 0)) == 1
    for wrong, said in (({"batch_size": 0}, "batch_size must"), ({"accumulation": 1.5}, "accum")):
        with pytest.raises(ValueError, match=said):
            Order(**({"batch_size": 2} | wrong))
    with pytest.raises(ValueError, match="rank must be from 0 to 1"):
        Order(1, ranks=2).steps(TEXTS, 0, 2)


# Shapes


def test_buckets_are_few_and_waste_at_most_an_eighth() -> None:
    buckets = [bucket(n) for n in range(1, 8193)]
    assert all(found >= n for n, found in enumerate(buckets, 1))
    assert all(found - n < max(32, n / 8) for n, found in enumerate(buckets, 1))
    assert all(found % 32 == 0 for found in buckets) and len(set(buckets)) == 48
    assert [bucket(n) for n in (1, 32, 33, 256, 257, 288, 289)] == [32, 32, 64, 256, 288, 288, 320]


def test_few_shapes_occur_and_rows_of_like_length_meet() -> None:
    examples = [example(n, images=n % 2, words=n * 13 % 100) for n in range(600)]
    batches = batches_of(examples, Order(4, seed=0))
    shapes, tokens, places = Counter[Any](), 0, 0
    for rows in batches.plan(0):
        lengths = [len(examples[n]) for (n,) in rows]
        shapes[bucket(max(lengths)), sum(examples[n].num_visual for (n,) in rows)] += 1
        tokens, places = tokens + sum(lengths), places + len(rows) * bucket(max(lengths))
    assert sum(shapes.values()) == 150 and len(shapes) < 40
    assert tokens / places > 0.85
    mixed = [batch for batch in shapes if batch[1] not in (0, 64)]
    assert len(mixed) <= 10  # batches of rows with and without images


def test_packing_fills_rows_and_keeps_to_the_length() -> None:
    rows = pack_rows(TEXTS, range(len(TEXTS)), 256)
    lengths = [sum(len(TEXTS[n]) for n in row) for row in rows]
    assert sorted(n for row in rows for n in row) == list(range(len(TEXTS)))
    assert max(lengths) <= 256 and sum(lengths) / (256 * len(rows)) > 0.9
    alone = pack_rows([example(0, words=200), *TEXTS[:3]], range(4), 256)
    assert (0,) in alone


# What is in a batch


def test_targets_are_the_next_tokens_and_weights_the_answers() -> None:
    messages = [
        {"role": role, "content": content}
        for role, content in (("user", "Who?"), ("assistant", "Me."), ("user", "Sure?"))
    ]
    two = Row("two", [*messages, {"role": "assistant", "content": "Yes."}], [], "row")
    examples = [*MIXED[:4], build_example(two, PROCESSOR, CONFIG)]
    assert len(examples[-1].answers) == 2
    images = [READER.read(i.source) for e in examples for i in e.images]
    batch = collate([[e] for e in examples], READER, images)
    length = batch.input_ids.shape[1]
    assert length == bucket(max(map(len, examples)))
    for b, e in enumerate(examples):
        ids = [0 if i == CONFIG.image_token_index else i for i in e.input_ids]
        assert batch.input_ids[b].tolist() == ids + [0] * (length - len(e))
        supervised = np.array(e.supervised[1:] + [False] * (length - len(e) + 1))
        assert batch.weights[b].tolist() == supervised.astype(float).tolist()
        taught = np.array(batch.targets[b])[supervised].tolist()
        assert taught == [i for i, s in zip(e.input_ids, e.supervised, strict=True) if s]
        assert taught[-1] == END
    places = [
        b * length + n
        for b, e in enumerate(examples)
        for n, i in enumerate(e.input_ids)
        if i == CONFIG.image_token_index
    ]
    assert batch.places.tolist() == places
    assert batch.lengths == [len(e) for e in examples] and batch.tokens == sum(batch.lengths)
    assert batch.targets.min().item() >= 0
    assert (batch.input_ids.dtype, batch.weights.dtype) == (mx.int32, mx.float32)


def test_padding_is_masked_by_length_though_its_id_may_be_the_end() -> None:
    """Padding holds an id that answers have too: only the weights tell them apart."""
    plain = TEXTS[3]
    zeros = replace(plain, input_ids=type(plain.input_ids)("i", [0] * len(plain)))
    batch = collate([[zeros]], READER, [])
    assert batch.weights.sum().item() == plain.num_supervised
    assert batch.weights[0, len(plain) - 1 :].sum().item() == 0


def test_a_row_without_supervised_tokens_adds_nothing() -> None:
    silent = replace(TEXTS[0], answers=())
    batch = collate([[silent], [TEXTS[1]]], READER, [])
    assert batch.weights[0].sum().item() == 0 < batch.weights[1].sum().item()
    from_start = replace(TEXTS[0], answers=(Span(0, 3),))
    assert collate([[from_start]], READER, []).weights[0].tolist()[:3] == [1, 1, 0]


def test_packed_rows_have_segments_and_nothing_crosses_them() -> None:
    rows = [[MIXED[2], MIXED[3]], [MIXED[1]]]
    images = [READER.read(i.source) for row in rows for e in row for i in e.images]
    batch = collate(rows, READER, images, packed=True)
    first, second = len(MIXED[2]), len(MIXED[3])
    length = batch.input_ids.shape[1]
    assert batch.ids == ["row 2", "row 3", "row 1"]
    segments = [0] * first + [1] * second
    assert batch.segments[0].tolist() == segments + [2] * (length - len(segments))
    assert batch.segments[1].tolist() == [0] * len(MIXED[1]) + [2] * (length - len(MIXED[1]))
    assert batch.weights[0, first - 1].item() == 0
    for row, start, alone in ((0, 0, MIXED[2]), (0, first, MIXED[3]), (1, 0, MIXED[1])):
        own = collate([[alone]], READER, images[: len(alone.images)])
        part = slice(start, start + len(alone))
        for name in ("input_ids", "targets", "weights"):
            packed, wanted = getattr(batch, name)[row, part], getattr(own, name)[0, : len(alone)]
            assert packed.tolist() == wanted.tolist()


# Images


def test_pixels_are_those_of_preprocess_bit_for_bit() -> None:
    order = Order(5, seed=4)
    for size in (256, 128):
        reader = ImageReader(PROCESSOR, size)
        for batch in Batches(MIXED, reader, order).batches(0):
            named = {e.id: e for e in MIXED}
            sources = [image.source for id in batch.ids for image in named[id].images]
            assert len(batch.image_sizes) == len(sources)
            if not sources:
                assert batch.pixel_values is None
                continue
            wanted = PROCESSOR.preprocess(sources, size)
            assert batch.pixel_values.dtype == mx.uint8
            assert mx.array_equal(batch.pixel_values / 255, wanted).item()


def test_photos_are_decoded_as_exactly_as_by_generate(tmp_path: Path) -> None:
    from PIL import Image

    photo = (
        tmp_path / "photo.jpg"
    )  # which a JPEG decoder could make smaller by itself, less exactly
    Image.open(PANDA).convert("RGB").resize((2000, 1500)).save(photo)
    found = READER.read(photo).pixels
    assert mx.array_equal(mx.array(found), PROCESSOR.preprocess(photo, dtype=mx.uint8)).item()
    fast = PROCESSOR.preprocess(photo, dtype=mx.uint8, fast=True)
    assert not mx.array_equal(mx.array(found), fast).item()


def test_tiled_images_stay_apart() -> None:
    pinpoints = [[512, 256], [256, 512]]
    processor = fv.Processor(PROCESSOR.tokenizer, 256, "anyres", pinpoints)
    batch = collate([[MIXED[1]]], ImageReader(processor), [ImageReader(processor).read(PANDA)])
    (pixels,) = batch.pixel_values
    assert mx.array_equal(pixels / 255, processor.preprocess(PANDA)).item() and len(pixels) == 3


def test_augmentation_is_drawn_from_seed_epoch_and_row_and_off_by_default() -> None:
    reader = ImageReader(PROCESSOR, augment=Augment())
    one = reader.read(PANDA, 0, 0, "row", 0).pixels
    assert np.array_equal(one, reader.read(PANDA, 0, 0, "row", 0).pixels)
    for names in ((1, 0, "row", 0), (0, 1, "row", 0), (0, 0, "other", 0), (0, 0, "row", 1)):
        assert not np.array_equal(one, reader.read(PANDA, *names).pixels)
    plain = READER.read(PANDA, 0, 0, "row", 0).pixels
    assert not np.array_equal(one, plain) and np.abs(one.astype(int) - plain).mean() < 40
    first, again = (
        [b.pixel_values for b in Batches(MIXED[1:5], reader, Order(2, seed=0)).batches(3)]
        for _ in range(2)
    )
    assert all(mx.array_equal(x, y).item() for x, y in zip(first, again, strict=True))


def test_augmentation_never_flips() -> None:
    from PIL import Image

    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 32, 20))
    for n in range(200):
        changed = np.asarray(Augment().apply(picture, random_of(n)).convert("L")).astype(int)
        assert changed[8, 10] > changed[8, 54] + 50 and changed[8, 10] > changed[56, 10] + 50


def test_an_image_that_breaks_on_the_way_is_named_with_its_row(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    file.write_bytes(PANDA.read_bytes()[:2000])
    broken = replace(MIXED[1], images=(replace(MIXED[1].images[0], source=file),), where="a, row 9")
    with pytest.raises(ValueError, match=r"a, row 9: Cannot read .*cut.png") as error:
        list(batches_of([broken, *TEXTS[:3]], Order(2)).batches(0))
    one_sentence(error)


def test_a_stream_that_is_dropped_leaves_no_thread() -> None:
    import threading

    stream = batches_of(MIXED, Order(2)).batches(0)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("fastvlm-images")]


# Tiles

PINPOINTS = [[128, 64], [64, 128], [128, 128], [192, 64]]
TILED = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "mm_hidden_size": 64}
TILED |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TILED |= {"num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 20000}


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_tiles_give_the_logits_that_generate_gives(merge: str, tmp_path: Path) -> None:
    model = random_model(0, **TILED, mm_patch_merge_type=merge)
    processor = fv.Processor(PROCESSOR.tokenizer, 64, "anyres", PINPOINTS)
    wide = mx.zeros((70, 300, 3), mx.uint8)
    turns = ["<image>\nWho? <image>", "Me.", "And <image>?", "No."]
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)
    ]
    row = Row("id", messages, [PANDA, PENGUINS, wide], "row 1")
    tiled = build_example(row, processor, model.config)
    assert len({image.tokens for image in tiled.images}) > 1
    cache = FeatureCache(tmp_path, model.vision_tower, "w", mode="anyres")
    for features in (None, cache, cache):
        reader = ImageReader(processor, features=features)
        images = [reader.read(image.source) for image in tiled.images]
        arrays = arrays_of(collate([[TEXTS[0]], [tiled]], reader, images))
        logits = model.language_model.logits(hidden_states(model, arrays))[1]
        for question, (start, _) in zip(row.questions(), tiled.answers, strict=True):
            inputs = read_inputs(model, processor, question.messages, question.images, Options())
            assert inputs.input_ids == list(tiled.input_ids[:start])
            wanted = model(mx.array([inputs.input_ids]), input_embeddings=inputs.embeddings)[0]
            assert mx.allclose(logits[:start], wanted, rtol=1e-5, atol=1e-5)
        cache.flush()
