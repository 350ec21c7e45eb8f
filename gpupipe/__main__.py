"""The command ``gpupipe``, which is ``python -m gpupipe`` too."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still loading ends it as it does later: one line, and exit code 1."""
    try:
        from gpupipe.cli import main as run  # noqa: PLC0415 - takes a second or two, in which Ctrl-C may come
    except KeyboardInterrupt:
        sys.exit("gpupipe: interrupted")
    run()


if __name__ == "__main__":
    main()
