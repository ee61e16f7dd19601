"""The model: an early-exit Llama, its draft, and two LoRA adapters. It knows nothing of rewards or optimizers."""

import warnings

with warnings.catch_warnings():
    # transformers 4.33 registers its outputs by a name that torch has since renamed, and says so while it is imported.
    warnings.filterwarnings("ignore", message=".*_register_pytree_node.*")
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
