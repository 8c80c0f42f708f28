"""effjax: the efficiency laboratory of the JAX world."""

__version__ = "0.1.0"
