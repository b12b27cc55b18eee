"""The command `graftlm`: parse, call the library, print.

One file a verb, each with `add_arguments(parser)` and `run(args)`. Nothing heavy is imported
before the arguments are known to be right, so `--help` and typing mistakes answer at once.
"""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from graftlm._version import __version__

VERBS = {
    "compose": "compose models into a folder with untrained bridges",
    "cache": "compute the frozen models' hidden states once, for training",
    "train": "train the bridges, from a YAML recipe or flags",
    "generate": "continue a prompt with a composed model",
    "playground": "try a composed model in the browser, beside its parts",
    "verify": "prove on your own models that a composition is exact",
    "evaluate": "run lm-eval on a composed model and each of its parts",
    "inspect": "show layers, connections, parameters and memory",
    "plan": "count memory and time before anything is downloaded",
    "reproduce": "repeat an experiment of the CALM paper",
}
KNOWN_ERRORS = (ValueError, TypeError, OSError, ImportError)  # GraftlmErrors are among them
WIDTH = 96
# They tell of kernels and devices that a machine lacks, of what torch has renamed, and bitsandbytes
# of every product of every layer that it casts to float16.
TALKATIVE = ("torchao", "torch.utils._pytree", "DeepSpeed", "bitsandbytes")


class Formatter(argparse.HelpFormatter):
    """Help of one width everywhere, so that the documents can hold it."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **options | {"width": WIDTH, "max_help_position": 32})
        self._action_max_length = 18

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """All names, then the value once: Python 3.13's way, in every version."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}".rstrip()


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of all verbs; options are added for the one that is used (None: for all)."""
    parser = argparse.ArgumentParser(
        prog="graftlm",
        description="Compose frozen language models with CALM bridges.",
        usage="graftlm [--help] [--version] VERB ...",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"graftlm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, prog="graftlm")
    for name, summary in VERBS.items():
        child = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        if verb in (None, name):
            importlib.import_module(f"graftlm.cli.{name}").add_arguments(child)
            add_common(child)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags that every verb has."""
    group = parser.add_argument_group("messages")
    group.add_argument("--verbose", action="store_true", help="show what transformers logs")
    group.add_argument(
        "--debug", action="store_true", help="show where an error comes from, not only its message"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after "graftlm"; by default those of the process.

    Returns:
        0 if it went well, 1 if a check failed, 2 for an error, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in argv if not word.startswith("-")), "")
    args, rest = build_parser(verb).parse_known_args(argv)
    args.argv = argv
    command = importlib.import_module(f"graftlm.cli.{args.verb}")
    if rest and not hasattr(command, "take_rest"):
        return fail(f"unknown option {rest[0]!r}; see graftlm {args.verb} --help")
    args.rest = rest
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        # DeepSpeed calls at every step what torch has renamed.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        try:
            quiet(args.verbose)
            return command.run(args)
        except KeyboardInterrupt:
            return fail("interrupted", status=130)
        except BrokenPipeError:
            # Whoever read our output has closed it; nothing is left to say to them.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:
            if args.debug or not (isinstance(error, KNOWN_ERRORS) or is_out_of_memory(error)):
                raise
            return fail(str(error) or type(error).__name__)


def fail(message: str, status: int = 2) -> int:
    """Print one line on stderr; returns the exit status."""
    print(f"graftlm: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU has no memory left; by name, because torch may not be imported."""
    return type(error).__name__ == "OutOfMemoryError"


def show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    """Print a warning as one line, without the source line Python adds."""
    print(f"graftlm: warning: {' '.join(str(message).split())}", file=sys.stderr)


def is_error(record: logging.LogRecord) -> bool:
    """Whether a library's log is of an error."""
    return record.levelno >= logging.ERROR


def quiet(verbose: bool) -> None:
    """Keep the libraries' logs and bars out of the way, unless asked for."""
    if verbose:
        return
    for library in TALKATIVE:
        logging.getLogger(library).addFilter(is_error)
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
