"""The forms that a recipe can give its records."""

from jaxinfra.data.documents.chat import Chat
from jaxinfra.data.documents.document import Text
from jaxinfra.data.documents.preference import Completion, Preference

AnyForm = Text | Chat | Completion | Preference
"""What becomes of a record: its text, a conversation, an answer to a prompt, or two answers of which one is better."""
