"""What every stage needs from its process: the extension, seeds, logging, artifacts on disk."""
