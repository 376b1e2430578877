"""What the command shows: a pipeline that digests a tree of files, and a service with a dashboard."""
