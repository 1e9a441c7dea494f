"""The training loop: what a step is worth, however it is cut; when it stops; how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from train_runs import (
    LENGTH,
    InMemory,
    batch,
    distance,
    joined,
    packed,
    same,
    small_model,
    trainer,
    weights_of,
)

from fastvlm_mlx import ops
from fastvlm_mlx.model.vision_training import TrainingFastViTHD
from fastvlm_mlx.train import loop
from fastvlm_mlx.train.dropout import draw_all
from fastvlm_mlx.train.log import LOG, read_log
from fastvlm_mlx.train.loop import NotFinite, Nothing, evaluate
from fastvlm_mlx.train.loss import AT_ONCE, arrays_of, bucket, encoded, hidden_states, loss
from fastvlm_mlx.train.optimizer import Optimizer
from fastvlm_mlx.train.parts import prepare
from fastvlm_mlx.train.settings import TrainOptions
from fastvlm_mlx.train.step import Step, add, checkpoint_activations

FULL = {"decoder": "full", "vision": "full"}
UNEVEN = [(3, 7), (1, 2), (4, 5)]  # rows and supervised tokens of three batches
Gradients = dict[str, mx.array]


def prepared(model: Any = None, **options: Any) -> Any:
    model = model or small_model()
    mx.random.seed(0)
    prepare(model, TrainOptions.of(FULL | options))
    return model


def step_of(model: Any, **options: Any) -> Step:
    parameters = dict(tree_flatten(model.trainable_parameters()))
    return Step(model, Optimizer(parameters, TrainOptions(**options)), 0.0, compiled=False)


def gradients_of(model: Any, batches: list[Any]) -> tuple[Gradients, float, float]:
    """Mean gradients, loss and count over some batches, one after the other."""
    step, sums = step_of(model), None
    for each in batches:
        sums = add(sums, step.compute(arrays_of(each)))
    assert sums is not None
    count = sums.tokens.item()
    return {n: g / count for n, g in sums.gradients.items()}, sums.loss.item() / count, count


# Loss


def test_the_loss_is_that_of_all_logits_masked() -> None:
    model, found = small_model(), batch(0)
    total, count = loss(model, arrays_of(found))
    ids = np.array(found.input_ids)
    ids[:, 1] = model.config.image_token_index
    logits = model(mx.array(ids), pixel_values=found.pixel_values)
    logits = np.array(logits, np.float64)
    picked = np.take_along_axis(logits, np.array(found.targets)[..., None], -1)[..., 0]
    entropy = np.log(np.exp(logits).sum(-1)) - picked
    assert count.item() == 10
    assert total.item() == pytest.approx((entropy * np.array(found.weights)).sum(), rel=1e-5)


def test_a_frozen_encoder_is_no_part_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arrays, seen = prepared(vision="frozen"), arrays_of(batch(0, rows=3)), []
    expected = loss(model, arrays)[0].item()
    original = type(model.vision_tower).__call__

    def encode(self: Any, pixels: Any) -> Any:
        seen.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(type(model.vision_tower), "__call__", encode)
    given: list[set[str]] = []
    step = step_of(model)
    step._compute = lambda arrays: given.append(set(arrays)) or step._sums(arrays)
    assert step.compute(arrays).loss.item() == pytest.approx(expected, rel=1e-6)
    assert "features" in given[0] and "pixel_values" not in given[0]
    assert seen == [1, 1, 1]  # on the CPU one after the other, which takes less memory
    tiled = arrays | {"pixel_values": [arrays["pixel_values"]]}
    assert [f.shape[0] for f in encoded(model, tiled)["features"]] == [3]
    trained = prepared(vision="full")
    assert encoded(trained, arrays) is arrays


def test_logits_are_computed_at_supervised_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_model(), []
    original = type(model.language_model).logits
    monkeypatch.setattr(
        type(model.language_model),
        "logits",
        lambda self, states: seen.append(states.shape) or original(self, states),
    )
    loss(model, arrays_of(batch(0)))
    assert seen == [(16, 32)]  # 10 of 24, in a bucket


def test_a_loss_in_parts_has_the_same_value_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients_of(prepared(), [batch(0, rows=4)])
    monkeypatch.setattr("fastvlm_mlx.train.loss.AT_ONCE", 8)
    parts = gradients_of(prepared(), [batch(0, rows=4)])
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)
    assert distance(whole[0], parts[0]) < 1e-5


def test_a_batch_without_supervised_tokens_adds_exactly_nothing() -> None:
    silent = batch(3, supervised=0)
    one = gradients_of(prepared(), [batch(0)])
    both = gradients_of(prepared(), [batch(0), silent])
    assert one[1:] == both[1:]
    assert same(one[0], both[0])


def test_buckets_are_few_and_waste_less_than_half() -> None:
    lengths = {bucket(n) for n in range(1, 3000)}
    assert len(lengths) == 16
    assert all(n <= bucket(n) < max(17, n * 1.5 + 1) for n in range(1, 3000))
    assert AT_ONCE in lengths


# Accumulation


def test_uneven_batches_give_the_gradients_of_one_batch_of_all_rows() -> None:
    parts = [batch(i, rows=r, supervised=s) for i, (r, s) in enumerate(UNEVEN)]
    together, one, count = gradients_of(prepared(), [joined(parts)])
    apart, other, same_count = gradients_of(prepared(), parts)
    assert count == same_count == 3 * 7 + 2 + 4 * 5
    assert one == pytest.approx(other, rel=1e-6)
    assert distance(together, apart) < 2e-5  # float32 sums in another order


def test_the_last_window_of_an_epoch_counts_with_its_true_tokens(tmp_path: Path) -> None:
    parts = [batch(i, rows=r, supervised=s) for i, (r, s) in enumerate(UNEVEN)]
    order = np.random.default_rng(0).permutation(3)
    run = trainer(tmp_path / "a", InMemory(parts), accumulation=2, **FULL)
    run.train()
    first, second = joined([parts[i] for i in order[:2]]), parts[order[2]]
    expected = trainer(tmp_path / "b", InMemory([first, second]), **FULL)
    expected.data.batches = lambda epoch, start: iter([first, second][start:])
    expected.train()
    assert run.position.step == expected.position.step == 2
    # Adam's steps have the size of the learning rate, whatever the gradient's; norms have not.
    logs = [read_log(tmp_path / name / LOG) for name in ("a", "b")]
    for line, other in zip(*logs, strict=True):
        assert line["supervised"] == other["supervised"]
        assert line["norm"] == pytest.approx(other["norm"], rel=1e-4)
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert distance(weights_of(run), weights_of(expected)) < 1e-3


def test_gradients_are_clipped_once_after_they_are_added_up(tmp_path: Path) -> None:
    data = InMemory([batch(0), batch(1)])
    run = trainer(tmp_path, data, accumulation=2, clip=1e-3, optimizer="muon")
    norms = []
    apply = run.step.apply
    run.step.apply = lambda sums, factor: norms.append(apply(sums, factor)) or norms[-1]
    mean = gradients_of(run.model, data.found)[0]
    run.train()
    expected = math.sqrt(sum((g.astype(mx.float32) ** 2).sum().item() for g in mean.values()))
    assert norms[0].item() == pytest.approx(expected, rel=1e-4)


def test_float16_needs_no_scaling_of_the_loss() -> None:
    """Of a batch's sum: the gradients of a mean over many tokens would vanish."""
    found = batch(0, rows=4, images=False)
    with ops.assume("cuda"):  # float16 is not refused there
        exact, *_ = gradients_of(prepared(vision="frozen"), [found])
        model = prepared(vision="frozen")
        model.set_dtype(mx.float16)
        half = step_of(model).compute(arrays_of(found)).gradients
    one, other = (
        np.concatenate([np.array(g[n].astype(mx.float32)).ravel() for n in exact])
        for g in (exact, half)
    )
    assert one @ other > 0.9999 * np.linalg.norm(one) * np.linalg.norm(other)
    assert np.mean((other == 0) & (one != 0)) < 0.01


def test_warm_up_counts_optimizer_steps_and_not_batches(tmp_path: Path) -> None:
    trainer(tmp_path, accumulation=2, epochs=2, warmup=2, schedule="constant").train()
    assert [line["rate_factor"] for line in read_log(tmp_path / LOG)] == [0.5, 1.0, 1.0, 1.0]


# Packing


def test_packed_rows_have_the_loss_and_the_gradients_of_unpacked_ones() -> None:
    found = batch(0, rows=3)
    apart, one, count = gradients_of(prepared(), [found])
    together, other, same_count = gradients_of(prepared(), [packed(found)])
    assert count == same_count
    assert other == pytest.approx(one, rel=1e-6)
    assert distance(apart, together) < 2e-5


def test_a_packed_row_sees_nothing_of_its_neighbours() -> None:
    model, found = prepared(), packed(batch(0, rows=3))
    changed = packed(batch(0, rows=3))
    changed.input_ids[0, LENGTH + 3] = (changed.input_ids[0, LENGTH + 3] + 1) % 96
    before, after = (hidden_states(model, arrays_of(each))[0] for each in (found, changed))
    rest = [*range(LENGTH + 3), *range(2 * LENGTH, 3 * LENGTH)]
    assert mx.array_equal(before[mx.array(rest)], after[mx.array(rest)]).item()
    assert not mx.array_equal(before, after).item()


def test_packed_batches_have_few_shapes(tmp_path: Path) -> None:
    """However many images and sequences they hold: each has from 2 to 5."""
    model, data = small_model(), []
    for number in range(4):
        found = batch(number, rows=2 + number, supervised=3)
        found.features = mx.random.normal((2 + number, 1, model.config.mm_hidden_size))
        found.pixel_values = None
        row = packed(found)
        row.features, row.ids = found.features, found.ids
        spare = 5 * LENGTH - row.input_ids.size
        for name in ("input_ids", "targets", "weights", "segments"):
            setattr(row, name, mx.pad(getattr(row, name), [(0, 0), (0, spare)]))
        row.lengths = [(2 + number) * LENGTH]
        data.append((found, row))
    for found, row in data:
        apart, one, _ = gradients_of(prepared(vision="frozen"), [found])
        together, other, _ = gradients_of(prepared(vision="frozen"), [row])
        assert one == pytest.approx(other, rel=1e-5)
        assert distance(apart, together) < 2e-5
    run = trainer(tmp_path, InMemory([row for _, row in data]), model, compiled=True)
    run.train()
    assert (run.position.step, run.step.shapes) == (4, 1)


# Forms of a step


def test_compiled_equals_plain_and_few_shapes_are_compiled(tmp_path: Path) -> None:
    # Supervised tokens vary from 2 to 10, in one bucket.
    data = InMemory([batch(i, supervised=1 + i % 5) for i in range(6)])
    options = {"dropout": 0.1, "epochs": 2, "gradient_checkpointing": True}
    plain = trainer(tmp_path / "a", data, **options)
    plain.train()
    compiled = trainer(tmp_path / "b", data, **options, compiled=True)
    compiled.train()
    assert compiled.step.shapes == 1
    assert plain.step.shapes == 12
    assert distance(weights_of(plain), weights_of(compiled)) < 1e-5


def test_computing_activations_again_changes_nothing_and_no_other_model() -> None:
    model, other = prepared(), prepared()
    expected, *_ = gradients_of(model, [batch(0)])
    before = type(other.layers[0])
    checkpoint_activations([*model.layers, *model.vision_tower.network])
    found, *_ = gradients_of(model, [batch(0)])
    # On the CPU the encoder is otherwise differentiated by layer, in other forms.
    assert distance(expected, found) < 1e-4
    assert type(other.layers[0]) is before is not type(model.layers[0])
    assert [n for n, _ in tree_flatten(model.parameters())] == [
        n for n, _ in tree_flatten(other.parameters())
    ]


def test_activations_of_the_training_form_are_not_computed_again(tmp_path: Path) -> None:
    model = small_model()
    model.update_modules({"vision_tower": TrainingFastViTHD(model.config.vision)})
    with pytest.raises(ValueError, match="gradient_checkpointing is for an encoder in inference"):
        trainer(tmp_path, model=model, vision="full", gradient_checkpointing=True)
    trainer(tmp_path, model=model, vision="frozen", gradient_checkpointing=True)  # the decoder's


def test_dropout_drops_the_same_where_activations_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = prepared(decoder="lora", vision="frozen", dropout=0.5)
    for _, layer in model.named_modules():
        if "lora_b" in layer:
            layer.lora_b = mx.random.normal(layer.lora_b.shape)
    draw_all(model)
    expected, value, _ = gradients_of(model, [batch(0)])
    monkeypatch.setattr("fastvlm_mlx.train.step.draw_all", lambda layer: None)
    checkpoint_activations(model.layers)
    found, same_value, _ = gradients_of(model, [batch(0)])
    assert same_value == pytest.approx(value, rel=1e-6)
    assert distance(expected, found) < 1e-5
    draw_all(model)
    assert gradients_of(model, [batch(0)])[1] != value


def test_dropout_works_while_training_and_not_in_an_evaluation() -> None:
    model = prepared(decoder="lora", vision="frozen", dropout=0.5)
    for _, layer in model.named_modules():
        if "lora_b" in layer:
            layer.lora_b = mx.random.normal(layer.lora_b.shape)
    arrays = arrays_of(batch(0))
    assert loss(model, arrays)[0].item() != loss(model, arrays)[0].item()
    data = InMemory([batch(0)])
    assert evaluate(model, data) == evaluate(model, data)
    assert model.training


def test_the_loss_of_an_evaluation_does_not_depend_on_the_batch_size() -> None:
    model = prepared()
    parts = [batch(i, rows=r, supervised=s) for i, (r, s) in enumerate(UNEVEN)]
    apart = evaluate(model, InMemory(parts))
    assert evaluate(model, InMemory([joined(parts)])) == pytest.approx(apart, rel=1e-6)


# Runs


def test_a_run_learns_what_it_is_shown(tmp_path: Path) -> None:
    run = trainer(tmp_path, InMemory([batch(0), batch(1)]), epochs=30, **FULL)
    before = evaluate(run.model, run.data)
    result = run.train()
    assert result.steps == 60
    assert evaluate(run.model, run.data) < 0.2 * before


def test_every_trained_tensor_moves_and_no_other(tmp_path: Path) -> None:
    for options in ({}, FULL, {"vision": "lora", "decoder": "dora"}, {"decoder": "frozen"}):
        run = trainer(tmp_path / json.dumps(options), learning_rate=1e-6, eps=1e-15, **options)
        before = {n: mx.array(v) for n, v in tree_flatten(run.model.parameters())}
        trained = set(run.parameters())
        run.train()
        for name, value in tree_flatten(run.model.parameters()):
            # A LoRA's first matrix has no gradient while the second is zero, so it moves later.
            assert mx.array_equal(before[name], value).item() != (name in trained), name


def test_a_loss_that_is_no_number_stops_before_it_is_saved_and_names_its_rows(
    tmp_path: Path,
) -> None:
    good, bad = [batch(i) for i in range(3)], batch(9, name="broken")
    bad.pixel_values = bad.pixel_values * math.nan
    data = InMemory([*good, bad])
    data.batches = lambda epoch, start: iter(data.found[start:])
    run = trainer(tmp_path, data, accumulation=2, save_every=1)
    with pytest.raises(NotFinite, match="loss of step 2 is no finite number") as error:
        run.train()
    assert "broken-0, broken-1" in str(error.value) and "2-0" not in str(error.value)
    last = run.checkpoints.last()
    assert last is not None and last.name == "step-00000001"


def test_rows_of_another_process_are_named_there(tmp_path: Path) -> None:
    def reduce(sums: Any) -> Any:
        return sums._replace(loss=sums.loss + math.nan)

    run = trainer(tmp_path, reduce=reduce)
    with pytest.raises(NotFinite, match=r"loss of step 1 .*; another process names its rows"):
        run.train()


def test_a_gradient_that_is_no_number_names_all_rows_of_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, InMemory([batch(0)]), accumulation=1)
    run.step.apply = lambda sums, factor: mx.array(math.inf)
    with pytest.raises(NotFinite, match=r"gradient of step 1 .*; its rows are 0-0, 0-1"):
        run.train()


def test_a_validation_loss_that_is_no_number_stops_the_run_and_names_its_rows(
    tmp_path: Path,
) -> None:
    bad = batch(9, name="broken")
    bad.pixel_values = bad.pixel_values * math.nan
    held_out = InMemory([batch(8), bad])
    run = trainer(tmp_path, held_out=held_out, eval_every=2, save_every=1)
    with pytest.raises(NotFinite, match=r"validation loss .*; its rows are broken-0, broken-1"):
        run.train()
    assert run.position.best is None and run.model.training
    assert run.checkpoints.last() == run.checkpoints.at(1)


def test_float16_is_named_where_numbers_are_too_large(tmp_path: Path) -> None:
    model = small_model()
    model.set_dtype(mx.float16)
    assert "in bfloat16 or float32" in str(loop.not_finite("The loss", ["a"], model))
    assert "bfloat16" not in str(loop.not_finite("The loss", ["a"], small_model()))


def test_a_loss_that_stays_zero_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, InMemory([batch(i, supervised=0) for i in range(5)]))
    with pytest.raises(Nothing, match="loss was 0 for 3 steps"):
        run.train()
    assert run.position.step == 2


def test_the_best_checkpoint_stays_and_training_stops_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.1])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    options = {"eval_every": 1, "save_every": 1, "keep": 1, "patience": 2, "validation": "0.5"}
    run = trainer(tmp_path, held_out=InMemory([batch(9)]), epochs=3, **options)
    result = run.train()
    assert (result.steps, result.best, result.best_step) == (4, 1.0, 2)
    assert result.stopped_early
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]
    final = weights_of(run)
    run.take_best()
    best = mx.load(str(tmp_path / "checkpoints" / "step-00000002" / "weights.safetensors"))
    assert same(weights_of(run), best) and not same(final, best)
    again = trainer(tmp_path, held_out=InMemory([batch(9)]), epochs=3, **options)
    assert again.train().steps == 4  # it is over


def test_the_log_has_a_line_for_each_step_with_its_rows(tmp_path: Path) -> None:
    run = trainer(tmp_path, held_out=InMemory([batch(9)]), accumulation=2)
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert sorted(row for line in steps for row in line["rows"]) == [
        f"{b}-{row}" for b in range(4) for row in range(2)
    ]
    assert all(line["supervised"] == 20 and line["norm"] > 0 for line in steps)
    assert [line["step"] for line in lines if "validation_loss" in line] == [2]


def test_memory_does_not_grow(tmp_path: Path) -> None:
    data = InMemory([batch(0, rows=1, images=False)])
    run = trainer(tmp_path, data, steps=500, projector="frozen", layers=["*.0.mlp.up_proj"])
    used = []
    run._between_steps = lambda asked: used.append(mx.get_active_memory()) or False
    run.train()
    assert len(used) == 500
    assert used[499] <= 1.1 * used[49]


def test_quantized_weights_and_their_scales_stay_frozen() -> None:
    model = small_model(hidden_size=64, intermediate_size=64)
    nn.quantize(model.language_model, 32, 4)
    mx.random.seed(0)
    trained = prepare(model, TrainOptions(decoder="lora"))
    assert trained.names and not [n for n in trained.names if n.endswith(("scales", "biases"))]
    with pytest.raises(ValueError, match="is quantized, and packed weights can't be trained"):
        prepare(model, TrainOptions(decoder="full"))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_fit_weights_of_any_bits(kind: str, bits: int) -> None:
    model = small_model(hidden_size=64, intermediate_size=64)
    nn.quantize(model.language_model, 32, bits)
    expected = loss(model, arrays_of(batch(0)))[0].item()
    mx.random.seed(0)
    prepare(model, TrainOptions(decoder=kind))
    # New adapters change nothing.
    assert loss(model, arrays_of(batch(0)))[0].item() == pytest.approx(expected, rel=1e-4)


# Patterns


def test_patterns_match_whole_paths_and_are_listed() -> None:
    model = small_model()
    options = TrainOptions(layers=("language_model.layers.1.*.q_proj", "*.down_proj"))
    trained = prepare(model, options)
    assert trained.adapted == [
        "language_model.layers.0.mlp.down_proj",
        "language_model.layers.1.mlp.down_proj",
        "language_model.layers.1.self_attn.q_proj",
    ]
    assert trained.adapted[0] in trained.lines()[1]


@pytest.mark.parametrize(
    "pattern", ["q_proj", "*.q_prj", "mm_projector.layers.0", "*.norm", "*.embed_tokens"]
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="layers: "):
        prepare(small_model(), TrainOptions(layers=("*.o_proj", pattern)))
