"""`python -m fastvlm_mlx` is the `fastvlm` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
