"""What gunicorn serves: `gunicorn --config python:api.gunicorn_conf api.wsgi:app`."""

from __future__ import annotations

from api.app import create_app
from localai_q.config import settings

app = create_app(settings())
