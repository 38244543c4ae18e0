"""How curvature statistics are measured on a live model: layers, hooks, token masks, sampled labels."""
