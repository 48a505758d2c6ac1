"""Which examples are confident, and which are paired: split, matching, keyed permutations."""
