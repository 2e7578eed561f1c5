"""An hour of training in a minute: the Trainer saves and rotates, the Hub and S3 fail, processes are killed."""
