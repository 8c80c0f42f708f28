"""How often the network runs when it writes: key/value caches, sampling, the decoding loop."""
