"""The model family as plain PyTorch modules: the eager baseline that everything else is measured against."""
