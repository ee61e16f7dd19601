"""Training at scale: corpus, distillation, averaging."""
