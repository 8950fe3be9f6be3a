"""The command line: python -m moe_numpy COMMAND."""

from __future__ import annotations

import sys

from moe_numpy import commands

if __name__ == "__main__":
    sys.exit(commands.main())
