"""Where it runs: meshes, and the rules that map the names of axes to them."""
