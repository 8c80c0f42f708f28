"""How often the network runs when it writes: caches, prefill and decoding, sampling, beam search."""
