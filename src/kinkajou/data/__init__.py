"""Records, chat format, order of rows, and the toy world of the demo."""
