"""What every run shares: settings, folder, log, checkpoint, processes."""
