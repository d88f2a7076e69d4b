"""`selfsup report`: what a run did, or several side by side, as one HTML page that needs nothing else."""
