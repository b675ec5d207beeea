from tests.tiny_run import tiny, tiny_data

__all__ = ["tiny", "tiny_data"]
