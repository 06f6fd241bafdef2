"""From source files to packed token windows on disk, and from there to batches."""
