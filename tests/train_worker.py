"""PyTorch and transformers train on what this library trains on; run by their Python.

    python train_worker.py FOLDER INPUTS.npz OUTPUTS.npz

INPUTS holds pixel_values [N, S, S, 3], input_ids [B, T] with transformers' image token at each
place, attention_mask and labels [B, T], the learning rate, the weight decay, the largest norm of
gradients and a number of steps. OUTPUTS gets the loss per supervised token, its gradients by name,
and the loss of each AdamW step on all but the vision encoder.
"""

import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText


def main() -> None:
    folder, given, target = sys.argv[1:]
    with np.load(given) as file:
        inputs = dict(file)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    loss = loss_of(model, inputs)
    loss.backward()
    gradients = {
        f"gradient.{name}": parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    outputs = {"loss": loss.item(), "losses": train(model, inputs), **gradients}
    np.savez(target, **outputs)


def loss_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Of all supervised tokens, whatever the rows' lengths."""
    pixel_values = torch.from_numpy(inputs["pixel_values"]).permute(0, 3, 1, 2).contiguous()
    ids, mask, labels = (
        torch.from_numpy(inputs[name]).long() for name in ("input_ids", "attention_mask", "labels")
    )
    out = model(input_ids=ids, attention_mask=mask, pixel_values=pixel_values, labels=labels)
    return out.loss


def train(model: Any, inputs: dict[str, Any]) -> list[float]:
    trained = {n: p for n, p in model.named_parameters() if "vision_tower" not in n}
    decayed = [p for p in trained.values() if p.ndim > 1]
    others = [p for p in trained.values() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": float(inputs["decay"])},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=float(inputs["rate"]), betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for _ in range(int(inputs["steps"])):
        model.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), float(inputs["norm"]))
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
