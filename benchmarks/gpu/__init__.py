"""The job behind `make gpu`: everything there is to do on a machine with an NVIDIA GPU."""
