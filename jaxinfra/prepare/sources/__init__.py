"""Where documents come from: records of files of every kind, read as a stream from local folders or object stores."""
