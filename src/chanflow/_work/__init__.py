"""Groups and worker groups: results, handler calls, retries and `map`."""
