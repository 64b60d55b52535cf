"""The consumer of one model's queues: one loaded copy, as many jobs at once as its engine has slots."""
