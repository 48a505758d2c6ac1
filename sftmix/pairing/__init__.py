"""Split into confident and unconfident examples, matching into pairs, keyed permutations."""
