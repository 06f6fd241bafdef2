"""Text before it is numbers: tokenizers, chat templates, fill-in-the-middle, packing. No torch."""
