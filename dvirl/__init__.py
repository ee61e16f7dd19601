"""The learning: draft, verify, and improve by reinforcement learning while generating."""

import kangaroo  # noqa: F401  # before any other import of transformers, whose known warning it silences
