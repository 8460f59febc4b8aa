"""Text in: corpora, question sets, prompts, labels, and the closed world that the demo's language model learns.

What comes in: text, JSON and table files, the name of a published set or of a Hugging Face dataset, a seed. What goes
out: documents, packed token ids, questions, prompts, labels. No model runs here.
"""

from jaxsae.data.corpus import read_dataset, read_documents
from jaxsae.data.labels import is_hallucinated
from jaxsae.data.prompts import encode_prompt, format_prompt, make_prompter
from jaxsae.data.questions import find_format, read_questions, write_questions
from jaxsae.data.tokens import pack

__all__ = [
    "encode_prompt",
    "find_format",
    "format_prompt",
    "is_hallucinated",
    "make_prompter",
    "pack",
    "read_dataset",
    "read_documents",
    "read_questions",
    "write_questions",
]
