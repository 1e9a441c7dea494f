"""The optimizer against its formula in float64, and the schedule of its learning rates."""

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx.train.optimizer import Optimizer, clip, schedule_factor
from fastvlm_mlx.train.settings import TrainOptions

NAMES = {
    "mm_projector.layers.0.weight": (4, 3),
    "mm_projector.layers.0.bias": (4,),
    "language_model.norm.weight": (3,),
    "language_model.layers.0.mlp.up_proj.weight": (5, 3),
    "vision_tower.network.0.0.layer_scale": (1, 1, 3),
}
DECAYED = {name for name in NAMES if name.endswith(("layers.0.weight", "up_proj.weight"))}


def draw(seed: int) -> dict[str, mx.array]:
    random = np.random.default_rng(seed)
    return {n: mx.array(random.normal(size=s).astype(np.float32)) for n, s in NAMES.items()}


def adamw(parameters, gradients, options, rates):
    """Loshchilov and Hutter's algorithm 2, as PyTorch has it, in float64."""
    b1, b2 = options.beta1, options.beta2
    w = {n: np.array(p, np.float64) for n, p in parameters.items()}
    m, v = ({n: np.zeros_like(x) for n, x in w.items()} for _ in range(2))
    for t, step in enumerate(gradients, 1):
        for n in w:
            g = np.array(step[n], np.float64)
            rate = rates[n]
            if n in DECAYED:
                w[n] = w[n] * (1 - rate * options.weight_decay)
            m[n] = b1 * m[n] + (1 - b1) * g
            v[n] = b2 * v[n] + (1 - b2) * g * g
            root = np.sqrt(v[n] / (1 - b2**t)) + options.eps
            w[n] = w[n] - rate * (m[n] / (1 - b1**t)) / root
    return w


def test_adamw_is_its_formula_with_a_rate_for_each_part_and_decay_for_weights_only() -> None:
    options = TrainOptions(
        weight_decay=0.1, learning_rate=1e-2, projector_learning_rate=3e-2, beta2=0.98
    )
    parameters, gradients = draw(0), [draw(i) for i in range(1, 11)]
    rates = {n: 3e-2 if n.startswith("mm_projector") else 1e-2 for n in NAMES}
    expected = adamw(parameters, gradients, options, rates)
    optimizer = Optimizer(parameters, options)
    for step in gradients:
        optimizer.set_rates(1.0)
        parameters = optimizer.apply(step, parameters)
    for name in NAMES:
        # Ten float32 steps; the first moments of gradients near 0 lose most.
        np.testing.assert_allclose(np.array(parameters[name]), expected[name], rtol=2e-5, atol=2e-6)


def test_small_learning_rates_still_move_every_tensor_of_half_precision() -> None:
    options = TrainOptions(learning_rate=1e-6)
    exact = {n: mx.ones(s) for n, s in NAMES.items()}
    half = {n: p.astype(mx.bfloat16) for n, p in exact.items()}
    optimizer = Optimizer(half, options)
    gradients = {n: mx.ones(s, mx.bfloat16) for n, s in NAMES.items()}
    for _ in range(5000):
        optimizer.set_rates(1.0)
        half = optimizer.apply(gradients, half)
        mx.eval(half, optimizer.state)
    for name, value in half.items():
        assert value.dtype == mx.bfloat16
        # A step of 1e-6 is a thousandth of what bfloat16 tells apart at 1; 5000 of them are 0.005.
        assert mx.all(mx.abs(value.astype(mx.float32) - 0.995) < 0.003).item(), name


def test_muon_makes_the_step_of_a_hidden_matrix_orthogonal_and_leaves_others_to_adamw() -> None:
    options = TrainOptions(optimizer="muon", learning_rate=1e-1, projector_learning_rate=1e-1)
    parameters, gradients = draw(0), draw(1)
    optimizer = Optimizer(parameters, options)
    optimizer.set_rates(1.0)
    after = optimizer.apply(gradients, parameters)
    name = "language_model.layers.0.mlp.up_proj.weight"
    change = np.array(after[name] - parameters[name], np.float64)
    singular = np.linalg.svd(change, compute_uv=False) / (0.1 * (5 / 3) ** 0.5)
    assert ((singular > 0.5) & (singular < 1.3)).all()  # five Newton-Schulz steps come so near
    bias = "mm_projector.layers.0.bias"
    steps = np.abs(np.array(after[bias] - parameters[bias]))
    np.testing.assert_allclose(steps, 0.1, rtol=1e-4)  # of AdamW, the first is the learning rate


def test_a_remembered_state_goes_on_as_the_one_it_was_taken_from() -> None:
    options = TrainOptions(optimizer="muon")
    parameters = {n: p.astype(mx.float16) for n, p in draw(0).items()}
    one, other = Optimizer(parameters, options), Optimizer(parameters, options)
    for i in range(3):
        one.set_rates(0.5)
        parameters = one.apply(draw(i), parameters)
    other.load(one.tensors())
    one.set_rates(0.5)
    other.set_rates(0.5)
    first, second = one.apply(draw(9), parameters), other.apply(draw(9), parameters)
    assert all(mx.array_equal(first[n], second[n]).item() for n in NAMES)


def test_the_state_of_other_parameters_is_refused() -> None:
    options = TrainOptions()
    others = {name: p for name, p in draw(0).items() if "bias" not in name}
    with pytest.raises(ValueError, match="other parameters"):
        Optimizer(draw(0), options).load(Optimizer(others, options).tensors())


def test_gradients_are_clipped_to_a_norm_of_all_of_them() -> None:
    gradients = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    clipped, norm = clip(gradients, 1.0)
    assert norm.item() == 5.0
    np.testing.assert_allclose(np.array(clipped["a"]), [0.6, 0], rtol=1e-5)
    np.testing.assert_allclose(np.array(clipped["b"]), [[0.8]], rtol=1e-5)
    assert clip(gradients, 10.0)[0]["a"].tolist() == [3.0, 0.0]
    assert clip(gradients, 0.0)[0] is gradients


def test_learning_rates_rise_in_optimizer_steps_and_fall_along_a_cosine() -> None:
    options = TrainOptions(warmup=4, final_rate=0.1)
    factors = [schedule_factor(step, 24, options) for step in range(25)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[14] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[24] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 0), (0.03, 3), (0.5, 50), (7, 7), (500, 100)])
def test_warm_up_is_a_share_of_the_steps_or_their_number(warmup: float, steps: int) -> None:
    options = TrainOptions(warmup=warmup, schedule="constant")
    rising = [s for s in range(100) if schedule_factor(s, 100, options) < 1]
    assert len(rising) == max(0, steps - 1)  # the last one of them has the full rate
