"""Groups and workers: results, calling a handler, retry, worker groups and their map."""
