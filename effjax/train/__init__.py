"""How training spends its budget: state, checkpoints, optimisers, schedules, objectives and the loop."""
