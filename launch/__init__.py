"""The one entry: `launch/train.py` and the parts of a run."""
