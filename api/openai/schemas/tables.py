"""The parameters of OpenAI's API that are accepted without effect, and those that are refused by name.

It owns the two tables, which `docs/api.md` shows too. A parameter without effect is a field of a model as well, and the
model owns which values it may have. A parameter with an effect is a field only.
"""

from __future__ import annotations

from localai_q.cluster.requests import Kind

ACCEPTED_WITHOUT_EFFECT: dict[Kind, dict[str, str]] = {
    "chat": {
        "user": "any string; it names your end user",
        "metadata": "up to 16 strings; nothing is stored with an answer",
        "store": "only false: answers are not stored",
        "service_tier": "only 'auto' and 'default': there is one tier",
        "safety_identifier": "any string; it names your end user",
        "prompt_cache_key": "any string; prompts are cached by their own text",
        "prompt_cache_retention": "'in_memory' or '24h'; a prompt stays cached while the model has room",
        "prompt_cache_options": "any; prompts are always cached implicitly",
        "modalities": "only ['text']: answers are text",
        "verbosity": "only 'medium', which is OpenAI's default: local models have no such setting",
    },
    "completion": {
        "user": "any string; it names your end user",
        "best_of": "only the value of 'n', which means that every choice is returned",
    },
    "embedding": {
        "user": "any string; it names your end user",
    },
}

UNSUPPORTED: dict[Kind, dict[str, str]] = {
    "chat": {
        "audio": "this cluster does not answer in audio; leave it out",
        "function_call": "it is OpenAI's old name; use 'tool_choice'",
        "functions": "it is OpenAI's old name; use 'tools'",
        "moderation": "this cluster runs no moderation; leave it out",
        "prediction": "this cluster has no predicted outputs; leave it out",
        "web_search_options": "this cluster does not search the web; leave it out",
    },
    "completion": {
        "suffix": "this cluster does not fill in between two texts; leave it out",
    },
    "embedding": {
        "dimensions": "vectors have the size that the model gives them; leave it out",
    },
}
