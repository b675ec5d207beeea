"""All record formats that a recipe may name."""

from jaxinfra.prepare.documents.chat import Chat
from jaxinfra.prepare.documents.document import Text
from jaxinfra.prepare.documents.preference import Completion, Preference

AnyFormat = Text | Chat | Completion | Preference
