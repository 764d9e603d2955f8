"""``python -m coppice`` is the ``coppice`` command."""

from coppice.cli import main

if __name__ == "__main__":
    main()
