"""The forms that a recipe can give its records."""

from jaxinfra.prepare.documents.chat import Chat
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.preference import Completion, Preference

AnyForm = Text | Chat | Completion | Preference
"""What becomes of a record: its text, a conversation, an answer to a prompt, or two answers of which one is better."""
