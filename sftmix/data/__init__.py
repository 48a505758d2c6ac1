"""From files to micro-batches: readers -> formats -> template -> prepare (Arrow) -> batches."""
