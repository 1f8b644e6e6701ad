"""``python -m sylinit`` is the ``sylinit`` command."""

from sylinit.cli import main

if __name__ == "__main__":
    main()
