"""Models, tokenizers and chat formats, the embedded default, drafters."""
