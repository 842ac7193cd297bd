"""Every test runs with one thread, so that the suite takes as long on a busy machine as on an idle one."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts; also for the scripts that tests run
