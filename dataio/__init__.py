"""Images and masks on their way to batches: class tables, readers, folders, dataloader, feature cache."""
