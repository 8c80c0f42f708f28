"""The HTTP server of `experiments.serve`."""
