"""Where the tasks are kept; one module a store."""
