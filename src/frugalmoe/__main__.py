"""`python -m frugalmoe` is the command `frugalmoe`."""

import sys

from frugalmoe.cli import main

sys.exit(main())
