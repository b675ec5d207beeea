"""What becomes of records: documents in spans of text, judged, compared and tokenized."""
