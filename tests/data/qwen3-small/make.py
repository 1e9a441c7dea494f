"""Made this folder: a small random LLaVA checkpoint with a Qwen3 decoder, and what it says.

    python make.py TARGET     # with torch, transformers 5 and safetensors

The decoder is transformers' `Qwen3ForCausalLM`, in float32. The encoder is that of `random-small`,
whose features the original PyTorch code computed; its tensors are not stored again.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

SMALL = Path(__file__).parents[1] / "random-small"
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
}
THETA = 50_000.0
IMAGE = -200
PROMPTS = ([5, 9, 11, IMAGE, 17, 23, 42, 7], [4, 8, 15, 16, 23, 42])
TOKENS = 16


def random_decoder() -> Qwen3ForCausalLM:
    rope = {"rope_type": "default", "rope_theta": THETA}
    model = Qwen3ForCausalLM(Qwen3Config(**TEXT, rope_parameters=rope)).float().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.copy_(1 + 0.5 * torch.randn(tensor.shape))
            else:
                tensor.copy_(torch.randn(tensor.shape) * 1.5 * tensor.shape[1] ** -0.5)
    return model


def embed(model: Qwen3ForCausalLM, ids: list[int], visual_tokens: torch.Tensor) -> torch.Tensor:
    """[1, T, hidden_size], with the image's tokens in the place of IMAGE."""
    table = model.get_input_embeddings().weight
    return torch.cat([visual_tokens if i == IMAGE else table[i][None] for i in ids])[None]


def answer(model: Qwen3ForCausalLM, embeddings: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt [T, vocab_size], and greedy tokens."""
    out = model(inputs_embeds=embeddings, use_cache=True)
    logits, tokens = out.logits[0], []
    for _ in range(TOKENS):
        tokens.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([tokens[-1:]])
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
    return logits, tokens


@torch.no_grad()
def main(target: Path) -> None:
    torch.manual_seed(7)
    model = random_decoder()
    features = load_file(SMALL / "expected.safetensors")["vision_features"]
    width, hidden = features.shape[-1], TEXT["hidden_size"]
    projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    logits, cases = {}, []
    for i, ids in enumerate(PROMPTS):
        logits[f"logits_{i}"], tokens = answer(model, embed(model, ids, projector(features[0])))
        cases.append({"input_ids": ids, "greedy_tokens": tokens})
    tensors = {
        **model.state_dict(),
        **{f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()},
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors")
    save_file({k: v.contiguous() for k, v in logits.items()}, target / "expected.safetensors")
    small = json.loads((SMALL / "llava" / "config.json").read_text())
    vision = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size", "vision_config")
    config = {
        "architectures": ["LlavaQwen3ForCausalLM"],
        "model_type": "llava_qwen3",
        **TEXT,
        "hidden_act": "silu",
        "rope_scaling": None,
        "rope_theta": THETA,
        "torch_dtype": "float32",
        "image_aspect_ratio": "pad",
        **{name: small[name] for name in vision},
    }
    for name, value in (("config.json", config), ("expected.json", cases)):
        (target / name).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
