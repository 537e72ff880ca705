"""Where the loggers' formats leave a value out: `exclude` of `logger.record`."""

QUIET = ("stdout", "log")  # scalars by the dozen: to CSV, JSON and TensorBoard only
PICTURE = ("stdout", "log", "json", "csv")
