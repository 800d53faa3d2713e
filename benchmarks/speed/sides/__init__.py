"""Each file is a side of a contest: a program that the driver keeps alive and asks to work (speed/line.py)."""
