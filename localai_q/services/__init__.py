"""Use cases: read a snapshot, let `cluster` decide, act through `store` and `bus`. Knows no HTTP."""
