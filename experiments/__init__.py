import os

# before any of them loads torch, which reads it: vstar.py says why
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
