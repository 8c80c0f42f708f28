"""How keys and values are held: as they are, in few bits, in pages."""
