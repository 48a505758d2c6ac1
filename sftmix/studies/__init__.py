"""Studies: several arms, several seeds each, and what they show."""
