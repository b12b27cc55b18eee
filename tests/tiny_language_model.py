"""The settings of a language model that is trained in a second."""

from graftlm.reproduce.language_model import LanguageModelSettings

SETTINGS = LanguageModelSettings(
    vocabulary=300,
    size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    tokens=640,
    row_length=16,
    batch_size=4,
    learning_rate=1e-2,
    max_length=64,
)
