"""``python -m gpupipe`` is the command ``gpupipe``."""

from gpupipe.cli import main

if __name__ == "__main__":
    main()
