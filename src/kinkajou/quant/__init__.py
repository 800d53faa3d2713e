"""int8 and 4-bit weights, the gate that judges them, and models for other programs."""
