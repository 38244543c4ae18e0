"""Who computes what, and moving it there: placement, collectives, fragments."""
