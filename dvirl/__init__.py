"""The learning: draft, verify, and improve by reinforcement learning while generating."""
