"""What a run needs before it starts: memory, bytes sent, time, price, disk."""
