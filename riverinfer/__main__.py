"""``python -m riverinfer`` is the ``riverinfer`` command."""

import sys

from riverinfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
