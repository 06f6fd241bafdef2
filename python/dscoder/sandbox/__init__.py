"""Programs that nobody has read, run under limits: one (`run`), many (`pool`), in twenty languages."""
