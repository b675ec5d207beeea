"""Sources: records of files, tables, functions and streams, from local folders or object stores."""
