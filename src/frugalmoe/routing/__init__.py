"""Which expert gets which token: the contract, its strategies, their losses and statistics."""
