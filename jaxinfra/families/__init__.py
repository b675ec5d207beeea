"""The families of published models: each is a file with its shapes and its form at Hugging Face, in both directions.

What several families share is in `common`, `experts`, `rotary` and `windows`; `registry` lists them.
"""
