"""What the server holds: load, overload, disconnects, memory, abuse, drain."""
