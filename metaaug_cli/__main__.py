"""``python -m metaaug_cli``: the same program as the ``metaaug`` command."""

import sys

from metaaug_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
