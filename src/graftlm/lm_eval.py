"""lm-eval's own command line, knowing composed models: `python -m graftlm.lm_eval`.

lm-eval finds models in a registry of its own and has no entry points for others. Its command with
graftlm imported first is all there is to add; every option is its own. Where graftlm is installed,
`lm_eval` itself does that (`src/lm_eval_plugin.pth`).

python -m graftlm.lm_eval --model graftlm --model_args pretrained=FOLDER --tasks gsm8k
"""

import importlib
import sys

from graftlm.cli import fail
from graftlm.evaluation import require_lm_eval


def main() -> int:
    """Run lm-eval's command; importing graftlm, above, has registered its models.

    Returns:
        0 if it went well, 2 if lm-eval is missing.
    """
    try:
        require_lm_eval()
    except ImportError as error:
        return fail(str(error))
    importlib.import_module("lm_eval.__main__").cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
