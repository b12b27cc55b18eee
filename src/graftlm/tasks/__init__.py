"""Tasks for lm-eval that it does not have itself; `graftlm evaluate` knows them.

In lm-eval's own command: `--include_path` with this folder (`python -m graftlm.tasks` prints it).
"""

from pathlib import Path

FOLDER = Path(__file__).parent
