"""The node: registers the machine, reports, keeps its replicas as children, and does long jobs in others."""
