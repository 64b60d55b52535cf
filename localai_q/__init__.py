"""localai_q: a task-queue cluster that serves LLMs from your own machines behind one OpenAI-compatible URL."""

__version__ = "0.1.0"
