"""`graftlm reproduce`: repeat an experiment."""

import argparse
import importlib

from graftlm.reproduce import flags

EXPERIMENTS = {
    "kv-arithmetic": ("kv_arithmetic", "section 4.1: arithmetic over memorised keys"),
    "kv-two-models": ("kv_two_models", "section 3.2: two models, each knowing half of the keys"),
    "low-resource": ("low_resource", "section 4.2: Chichewa, Guarani or Xhosa into English"),
    "code": ("code", "section 4.3: completing, writing and describing Python functions"),
    "translate": ("translate", "real models: Indonesian, Turkish and Swedish into English"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Each experiment's own flags."""
    parser.usage = "graftlm reproduce EXPERIMENT [options]"
    experiments = parser.add_subparsers(
        dest="experiment", metavar="EXPERIMENT", required=True, prog="graftlm reproduce"
    )
    for name, (_, summary) in EXPERIMENTS.items():
        child = experiments.add_parser(
            name,
            help=summary,
            usage=f"graftlm reproduce {name} [options]",
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        flags.add_arguments(child, name)


def run(args: argparse.Namespace) -> int:
    """Run the experiment."""
    from graftlm.reproduce.run import run as run_experiment  # torch; `--help` does without

    name = args.experiment
    module = importlib.import_module(f"graftlm.reproduce.{EXPERIMENTS[name][0]}")
    if args.examples is not None and args.examples < 1:
        raise ValueError(f"examples must be at least 1, got {args.examples}")
    experiment = module.experiment(**flags.choices(args, name))
    main = list(experiment.systems)
    run_experiment(
        experiment,
        systems=flags.named_systems(args.systems, args.seeds, main, list(experiment.ablations)),
        output=flags.output_folder(args, name),
        jobs=args.jobs,
        device=args.device,
        run_code=getattr(args, "allow_code_execution", False),
        plots=not args.no_plots,
        command=flags.command_line(args, name),
    )
    return 0
