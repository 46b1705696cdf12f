"""Laws that every routing strategy and every executor obeys: `frugalmoe laws`, and what the tests enumerate."""
