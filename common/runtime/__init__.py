"""What everything else stands on: errors, signals, files, records, processes, devices, the conversation on stderr."""
