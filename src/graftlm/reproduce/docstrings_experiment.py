"""What `graftlm reproduce docstrings` composes: a small general model reads a model of code."""

from graftlm.reproduce.docstrings_data import load_corpus
from graftlm.reproduce.translate_experiment import Experiment
from graftlm.reproduce.translate_systems import Composition
from graftlm.reproduce.translate_training import TrainingSettings

DOCSTRINGS = Experiment(
    name="docstrings",
    title="Python functions and docstrings",
    composition=Composition(
        anchor="gemma-3-270m",
        augmenting="qwen2.5-coder-0.5b-instruct",
        # The coder's late layers know the code best, and the anchor needs layers left to use it.
        connections=((9, 1), (13, 3), (17, 5), (20, 7), (22, 8), (23, 10), (23, 12), (23, 14)),
        width=192,
        num_heads=6,
        learning_rate=4e-4,
        lora_learning_rate=7e-4,
    ),
    training=TrainingSettings(batch_size=4),
    load=lambda num_tests: load_corpus(num_tests=num_tests),
    about="Short documented functions of the standard library and of installed packages, so that "
    "the numbers depend on what is installed; every fourth package is held out. The group names "
    "what is to be written: the docstring's first sentence, or the function.",
)
