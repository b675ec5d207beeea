"""From records to token ids: formats and chat templates, filters, deduplication, encoding."""
