"""Generation from a model: requests in, text and tokens out; knows nothing of training."""
