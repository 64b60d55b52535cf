"""What clients may send to OpenAI's endpoints: from the bytes of a body to a request, or to one error.

The modules of this package own a subject each: the three bodies, what they are made of, and how a mistake is worded.
"""

from api.openai.schemas.parsing import honoured, parse_chat, parse_completion, parse_embedding
from api.openai.schemas.tables import ACCEPTED_WITHOUT_EFFECT, UNSUPPORTED

__all__ = [
    "ACCEPTED_WITHOUT_EFFECT",
    "UNSUPPORTED",
    "honoured",
    "parse_chat",
    "parse_completion",
    "parse_embedding",
]
