"""Another library on a folder that this one wrote; run by that library's Python.

    python peer_worker.py LIBRARY FOLDER INPUTS.npz OUTPUTS.npz

For a model, INPUTS holds pixel_values [1, S, S, 3], input_ids [T] with images as the library wants
them, and the number of greedy tokens; OUTPUTS gets features [n, C] before the projector, logits
[T, V] of the prompt or [V] of its last token, and the tokens.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def run_mlx_vlm(folder: Path, inputs: Arrays) -> Arrays:
    import mlx.core as mx
    from mlx_vlm.generate import generate_step
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    pixel_values = mx.array(inputs["pixel_values"])
    input_ids = mx.array(inputs["input_ids"])[None]
    mask, channels_first = mx.ones_like(input_ids), pixel_values.transpose(0, 3, 1, 2)
    _, features, _ = model.vision_tower(pixel_values)
    embeddings = model.get_input_embeddings(input_ids, channels_first, mask=mask).inputs_embeds
    logits = model.language_model(None, inputs_embeds=embeddings).logits
    steps = generate_step(
        input_ids, model, channels_first, mask, max_tokens=int(inputs["tokens"]), temperature=0.0
    )
    tokens = [int(token) for token, _ in steps]
    return {"features": features.flatten(1, 2)[0], "logits": logits[0, -1], "tokens": tokens}


def run_processor(folder: Path, inputs: Arrays) -> Arrays:
    """mlx-vlm's."""
    import mlx_vlm.models.fastvlm  # noqa: F401  so that the next knows it
    from mlx_vlm.utils import load_processor
    from PIL import Image

    processor = load_processor(folder)
    image = Image.open(str(inputs["image"]))
    made = processor(images=image, text=str(inputs["text"]), return_tensors=None)
    return {"input_ids": made["input_ids"][0], "pixel_values": made["pixel_values"]}


def run_transformers(folder: Path, inputs: Arrays) -> Arrays:
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == "FastVlmForConditionalGeneration"
    problems = {name: sorted(found) for name, found in loading.items() if found}
    assert not problems, problems
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer(str(inputs["text"]), add_special_tokens=False).input_ids
    return outputs_of(model.eval(), inputs) | {"text_ids": text}


def run_each(folder: Path, inputs: Arrays) -> Arrays:
    """transformers' model on several prompts, whose inputs and outputs begin with their number."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for n in range(int(inputs["number"])):
        names = ("pixel_values", "input_ids", "tokens")
        outputs = outputs_of(model, {name: inputs[f"{n}.{name}"] for name in names})
        found |= {f"{n}.{name}": value for name, value in outputs.items()}
    return found


def write_training_form(folder: Path, inputs: Arrays) -> Arrays:
    """A random model in training form, with its weights saved to the folder."""
    import torch
    from transformers import AutoConfig, FastVlmForConditionalGeneration

    config = AutoConfig.from_pretrained(folder)
    config.vision_config.model_args["inference_mode"] = False
    torch.manual_seed(0)
    model = FastVlmForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1 or "gamma" in name:
                centre = 0.0 if name.endswith("bias") else 1.0
                tensor.copy_(centre + 0.2 * torch.randn(tensor.shape))
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape))
            elif name.endswith("running_mean"):
                tensor.copy_(0.2 * torch.randn(tensor.shape))
    model.save_pretrained(folder)
    return outputs_of(model, inputs)


def run_peft(folder: Path, inputs: Arrays) -> Arrays:
    """transformers' model with an adapter that PEFT reads, merged."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(inputs["adapter"])).merge_and_unload()
    return outputs_of(model.eval(), inputs)


def merge_with_peft(folder: Path, inputs: Arrays) -> Arrays:
    """The tensors of LLaVA's model with an adapter that PEFT reads, merged.

    LLaVA's own loader does the same after it has read non_lora_trainables.bin.
    """
    import torch
    from peft import PeftModel

    model = holder_of(folder)
    adapter = Path(str(inputs["adapter"]))
    others = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    model.load_state_dict(others, strict=False)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach().float() for name, tensor in merged.state_dict().items()}


def train_with_peft(folder: Path, inputs: Arrays) -> Arrays:
    """As `merge_with_peft`, with an adapter drawn at random, which PEFT writes."""
    merged = draw_with_peft(holder_of(folder), folder, inputs)
    return {name: tensor.detach().float() for name, tensor in merged.state_dict().items()}


def train_transformers_with_peft(folder: Path, inputs: Arrays) -> Arrays:
    """As `run_peft`, with an adapter drawn at random, which PEFT writes."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return outputs_of(draw_with_peft(model, folder, inputs).eval(), inputs)


def draw_with_peft(model: Any, folder: Path, inputs: Arrays) -> Any:
    """A model merged with a random adapter, which is written."""
    import json

    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**json.loads(str(inputs["settings"]))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapter = Path(str(inputs["adapter"]))
    model.save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(folder)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return model.merge_and_unload()


def holder_of(folder: Path) -> Any:
    """Modules under the names of a LLaVA checkpoint, which hold its tensors and compute nothing."""
    from safetensors.torch import load_file
    from torch import nn

    def module_of(weight: Any) -> Any:
        if weight is None:
            return nn.Module()
        if weight.ndim == 2:
            return nn.Linear(weight.shape[1], weight.shape[0])
        if weight.ndim == 4:
            return nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:])
        return nn.LayerNorm(len(weight))

    root = nn.Module()
    root.prepare_inputs_for_generation = None
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        *path, key = name.split(".")
        place = root
        for i, part in enumerate(path):
            if not hasattr(place, part):
                weight = tensors.get(".".join([*path[: i + 1], "weight"]))
                place.add_module(part, module_of(weight))
            place = getattr(place, part)
        setattr(place, key, nn.Parameter(tensor.float(), requires_grad=False))
    for module in root.modules():
        bias = getattr(module, "bias", None)
        if bias is not None and bias.requires_grad:  # its own, which the checkpoint does not have
            module.bias = None
    return root


def outputs_of(model: Any, inputs: Arrays) -> Arrays:
    import torch

    pixel_values = torch.from_numpy(inputs["pixel_values"]).permute(0, 3, 1, 2).contiguous()
    input_ids = torch.from_numpy(inputs["input_ids"]).long()[None]
    with torch.no_grad():
        features = model.model.vision_tower(pixel_values).last_hidden_state
        out = model(input_ids=input_ids, pixel_values=pixel_values, use_cache=True)
        logits, tokens = out.logits[0], []
        for _ in range(int(inputs["tokens"])):
            token = out.logits[:, -1].argmax(-1)
            tokens.append(int(token))
            out = model(input_ids=token[None], past_key_values=out.past_key_values, use_cache=True)
    return {"features": features.flatten(2)[0].T, "logits": logits, "tokens": tokens}


LIBRARIES = {
    "mlx-vlm": run_mlx_vlm,
    "processor": run_processor,
    "transformers": run_transformers,
    "transformers-each": run_each,
    "training-form": write_training_form,
    "peft": run_peft,
    "peft-merge": merge_with_peft,
    "peft-train": train_with_peft,
    "peft-train-transformers": train_transformers_with_peft,
}


def main() -> None:
    library, folder, inputs, target = sys.argv[1:]
    with np.load(inputs) as given:
        outputs = LIBRARIES[library](Path(folder), dict(given))
    np.savez(target, **{name: np.array(value) for name, value in outputs.items()})


if __name__ == "__main__":
    main()
