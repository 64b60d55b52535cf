"""What runs on nodes: the node itself, its replicas, the jobs that it does, and the backends."""
