"""Text in: corpora, question sets, labels, and the closed world that the demo's language model learns.

What comes in: text and JSONL files, a Hugging Face dataset's name, a seed. What goes out: documents, packed token
ids, questions, labels. No model runs here.
"""

from jaxsae.data.corpus import read_dataset, read_documents
from jaxsae.data.labels import is_hallucinated
from jaxsae.data.questions import format_prompt, read_questions, write_questions
from jaxsae.data.tokens import pack

__all__ = [
    "format_prompt",
    "is_hallucinated",
    "pack",
    "read_dataset",
    "read_documents",
    "read_questions",
    "write_questions",
]
