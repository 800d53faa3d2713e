"""How weights lie over processes: the only place that imports torch.distributed."""
