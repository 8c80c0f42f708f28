"""How weights are stored: fewer bits, codes, planes."""
