"""lm-eval's own command line, knowing composed models: `python -m graftlm.lm_eval`.

lm-eval finds models in a registry of its own and has no entry points for others. Its command with
graftlm imported first is all there is to add; every option is its own. Where graftlm is installed,
`lm_eval` itself does that (`src/lm_eval_plugin.pth`).

python -m graftlm.lm_eval --model graftlm --model_args pretrained=FOLDER --tasks gsm8k
"""

import importlib

import graftlm as graftlm  # which registers its models


def main() -> None:
    """Run lm-eval's command.

    Raises:
        ImportError: If lm-eval is missing.
    """
    try:
        command = importlib.import_module("lm_eval.__main__")
    except ModuleNotFoundError as exc:
        raise ImportError(
            "evaluation needs the lm-eval package, which is missing; "
            "pip install 'graftlm[evaluate]'"
        ) from exc
    command.cli_evaluate()


if __name__ == "__main__":
    main()
