"""Where things are kept: local files that no kill leaves half written, objects of folders and buckets, free space."""
