"""What has been built on minq: each file an idea, run as `python -m lab.NAME`."""
