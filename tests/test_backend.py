import os
import subprocess
import sys


def test_import_without_a_backend_names_the_extras(tmp_path):
    """On Linux mlx alone holds no backend, and its own error names a library file."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: no such file')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import fastvlm_mlx"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode != 0
    assert "pip install 'fastvlm-mlx[cpu]'" in found.stderr.splitlines()[-1]
