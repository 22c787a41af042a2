"""``python -m acdc.cli``: as ``python -m acdc``."""

from acdc.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
