"""Random tensors and the arithmetic of FastViT in float64, which tests compare with."""

import numpy as np


class RandomTensors:
    """Tensors by name, random and made when first asked for."""

    def __init__(self, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.tensors: dict[str, np.ndarray] = {}

    def tensor(self, name: str, *shape: int, mean: float = 0, std: float = 0.3) -> np.ndarray:
        if name not in self.tensors:
            values = self.random.normal(mean, std, shape)
            self.tensors[name] = values.astype(np.float32)
        assert self.tensors[name].shape == shape
        return self.tensors[name].astype(np.float64)

    def batch_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        dim = x.shape[-1]
        mean = self.tensor(f"{name}.running_mean", dim)
        var = self.tensor(f"{name}.running_var", dim, mean=1, std=0.1)
        scale = self.tensor(f"{name}.weight", dim, mean=1)
        return (x - mean) / np.sqrt(var + 1e-5) * scale + self.tensor(f"{name}.bias", dim)


def convolution(x: np.ndarray, weight: np.ndarray, stride: int = 1, groups: int = 1) -> np.ndarray:
    """[B, H, W, C] * [out, k, k, C / groups], zero-padded by half the kernel."""
    (batch, height, width, channels), (out, kernel) = x.shape, weight.shape[:2]
    pad = (kernel // 2, kernel // 2)
    x = np.pad(x, ((0, 0), pad, pad, (0, 0))).reshape(
        batch, height + 2 * pad[0], -1, groups, channels // groups
    )
    weight = weight.reshape(groups, out // groups, kernel, kernel, -1)
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    y = np.zeros((batch, rows, columns, groups, out // groups))
    for i in range(kernel):
        for j in range(kernel):
            tap = x[:, i:, j:][:, ::stride, ::stride][:, :rows, :columns]
            y += np.einsum("bhwgc,gnc->bhwgn", tap, weight[:, :, i, j])
    return y.reshape(batch, rows, columns, out)
