"""What a run of weeks needs: errors, processes, lists of images, the region cache, loader, checkpoint, report."""
