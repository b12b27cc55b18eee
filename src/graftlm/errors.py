"""The errors a caller may want to catch by intent.

GraftlmError
├── UnsupportedModelError(TypeError)      a model of a kind graftlm cannot compose
└── CheckpointMismatchError(ValueError)   a folder that does not fit its files or its base models

Everything else is a plain ValueError or TypeError with a sentence that says what to change.
"""


class GraftlmError(Exception):
    """Base of every error class defined by graftlm."""


class UnsupportedModelError(GraftlmError, TypeError):
    """A model that has no stack of decoder layers graftlm can read from or write to."""


class CheckpointMismatchError(GraftlmError, ValueError):
    """A checkpoint that is damaged, newer than this version, or made for other base models."""
