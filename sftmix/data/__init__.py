"""From files to encoded examples: readers -> formats -> template -> tokenizer -> Arrow."""
