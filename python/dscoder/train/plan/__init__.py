"""What training a model on a cluster takes: memory, traffic, time and cost, before any of it is rented."""
