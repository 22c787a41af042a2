"""``python -m benchmarks.shortcuts [ioi-small|docstring-small|all]``: train them again."""

from benchmarks.shortcuts.train import main

if __name__ == "__main__":
    main()
