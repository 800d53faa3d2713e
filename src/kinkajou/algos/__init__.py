"""The formulas: pure functions over tensors, importing torch alone. Each cites its source."""
