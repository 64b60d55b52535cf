"""The cluster's own API, for admins: nodes, jobs, models, keys, files, metrics."""
