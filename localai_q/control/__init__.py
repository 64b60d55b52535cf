"""The control process: a Celery worker on the queue `control` whose loops keep the cluster what it should be."""
