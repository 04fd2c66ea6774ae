"""Pre-training of language models: models, per-domain gradients, and the trainer around them."""
