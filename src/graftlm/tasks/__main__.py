"""`python -m graftlm.tasks` prints the folder of the tasks, for lm-eval's `--include_path`."""

from graftlm.tasks import FOLDER

print(FOLDER)
