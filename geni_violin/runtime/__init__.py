"""The small shared shell around the core: clock, settings, HTTP, problem documents, processes, logs."""
