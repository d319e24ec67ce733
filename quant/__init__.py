"""Number formats as plain tensors (codes and scales), schemes that choose them, and their error budget."""
