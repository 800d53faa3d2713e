"""One model code for training, scoring and rollouts: transformers modules behind one attention function."""
