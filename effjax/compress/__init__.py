"""How weights are stored: pure functions `(definition, variables) -> (definition', variables')`."""
