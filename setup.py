from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version: dict[str, str] = {}
exec((root / "fastvlm_mlx" / "version.py").read_text(), version)

setup(
    name="fastvlm-mlx",
    version=version["__version__"],
    description="FastVLM, the vision language model, native in MLX for Apple silicon",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["fastvlm_mlx", "fastvlm_mlx.*"]),
    package_data={"fastvlm_mlx": ["py.typed", "nano/*", "nano/images/*", "serve/page/*"]},
    # The lowest that pass the tests; constraints/lowest.txt installs them, with reasons.
    install_requires=[
        "mlx>=0.32.4",
        "mlx-lm>=0.32.2",
        "numpy>=2.0.2",
        "huggingface-hub>=1.33",
        "safetensors>=0.4.3",
        "pillow>=10.1",
        # The photos of every iPhone are HEIC.
        "pillow-heif; sys_platform == 'darwin'",
    ],
    extras_require={
        # MLX's backends on Linux, named as mlx-lm names them; on a Mac none is needed.
        "cpu": ["mlx[cpu]"],
        "cuda12": ["mlx[cuda12]"],
        "cuda13": ["mlx[cuda13]"],
        # Reads checkpoints that come as PyTorch pickles (.bin, .pth) instead of safetensors.
        "torch": ["torch"],
        # Reads and writes the Core ML package of the Apple silicon checkpoints.
        "coreml": ["coremltools>=8"],
        # Reads HEIC photos on Linux too.
        "heic": ["pillow-heif"],
        # `fastvlm serve`: the HTTP interfaces, their metrics, and answers that follow a schema.
        "serve": ["fastapi", "uvicorn", "prometheus-client", "llguidance>=1.8"],
        # Answers that follow a schema, a regular expression or a list of choices.
        "schema": ["llguidance>=1.8"],
        # Reads video files, cameras and streams; and the screen.
        "video": ["av", "mss"],
        # Reads and writes tables of captions in Parquet.
        "parquet": ["pyarrow"],
        # Reads training data from the Hugging Face Hub, and what the library saved; 5.2 makes no
        # data set where pyarrow is 26.
        "datasets": ["datasets<5"],
        # Draws the plots of `python -m benchmarks report`.
        "benchmark": ["matplotlib"],
        # `fastvlm train --report-to wandb` or `tensorboard`.
        "wandb": ["wandb"],
        "tensorboard": ["tensorboardX"],
        "test": ["pytest", "hypothesis", "jsonschema"],
        # The server is tested with its interfaces' own clients, and its page in the system's
        # Chromium or Chrome.
        "dev": [
            "pytest",
            "hypothesis",
            "jsonschema",
            "openai",
            "anthropic",
            "ollama",
            "playwright",
            "pytest-xdist",
            "ruff",
            "mypy",
            "pre-commit",
        ],
    },
    entry_points={"console_scripts": ["fastvlm = fastvlm_mlx.cli.main:main"]},
)
