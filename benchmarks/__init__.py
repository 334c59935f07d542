"""Speed and memory of every op against plain torch, torch.compile, the best peer and the measured limit."""
