"""mlx-vlm's server, for a folder whose encoder may be of any size; its Python runs this file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    """peer_server.py FOLDER --port PORT"""
    from mlx_vlm.models.fastvlm.config import VisionConfig
    from mlx_vlm.server import cli

    folder, *flags = sys.argv[1:]
    importlib.import_module("mlx_sides").set_geometry(VisionConfig, Path(folder))
    sys.argv = ["mlx_vlm.server", "--model", folder, "--host", "127.0.0.1", *flags]
    cli.main()


if __name__ == "__main__":
    main()
