"""`python -m graftlm` is the command `graftlm`."""

import sys

from graftlm.cli import main

sys.exit(main())
