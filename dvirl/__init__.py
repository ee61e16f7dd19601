"""The learning: draft, verify, and improve by reinforcement learning while generating."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvirl.buffer import ReplayBuffer
    from dvirl.config import DVIConfig
    from dvirl.trainer import DVITrainer

__all__ = ["DVIConfig", "DVITrainer", "ReplayBuffer"]

# transformers 4.33 registers its outputs by a name that torch has since renamed, and warns of it when it is imported.
warnings.filterwarnings("ignore", message=".*_register_pytree_node.*")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import dvirl` needs no torch."""
    homes = {"DVIConfig": "config", "DVITrainer": "trainer", "ReplayBuffer": "buffer"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dvirl.{homes[name]}"), name)
