"""What a run will need, before it starts: memory and time from a model's settings alone, without its weights."""
